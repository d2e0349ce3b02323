"""The recipe's `extensions`: which prompts become conversations of several turns, of what kind, and who writes them."""

from pydantic import Field

from deltaray.recipe.models import Section, Seed, Teacher

MOST_TURNS, MOST_TURNS_REPEATED = 8, 5
"""As in OLMo 3's multi-turn pairs (arXiv 2512.13961)."""


class Extension(Section):
    share: float = Field(gt=0, le=1)
    """Of the prompts of one user turn: a seeded draw in which no prompt is drawn for two kinds."""
    turns: int = Field(MOST_TURNS, ge=4, le=MOST_TURNS)
    """Turns of user and assistant at most, the answer that the teachers give included; how many is drawn per prompt."""
    sources: list[str] | None = None
    """Draw from these sources only."""


class Repeat(Extension):
    turns: int = Field(MOST_TURNS_REPEATED, ge=4, le=MOST_TURNS_REPEATED)


class Extensions(Section):
    by: Teacher
    """The model that writes: for the vLLM pools, or an endpoint, exactly like a teacher. `system` goes with its
    answers, not with what it writes as the user."""
    seed: Seed = 0
    """Of the draws: which prompts, and how many turns."""
    max_tokens: int = Field(2048, ge=8)
    """Of the extended prompt, in the student's tokens; longer conversations are dropped and counted."""
    self_talk: Extension | None = None
    """The prompt begins a conversation that the model goes on with, in both roles; teachers answer its last turn."""
    related_query: Extension | None = None
    """Before the prompt stand other questions on the same matter, and the model's answers."""
    paraphrase: Extension | None = None
    """Before the prompt it was asked in other words, and answered."""
    repeat: Repeat | None = None
    """Before the prompt the same was asked and answered."""

    @property
    def kinds(self) -> dict[str, Extension]:
        """The kinds that are asked for, by name, in a fixed order."""
        named = {
            "self_talk": self.self_talk,
            "related_query": self.related_query,
            "paraphrase": self.paraphrase,
            "repeat": self.repeat,
        }
        return {name: kind for name, kind in named.items() if kind is not None}
