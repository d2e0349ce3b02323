"""A reward model scores files of responses: a transformers sequence classifier in an actor per worker."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from deltaray.data.store import Store
from deltaray.data.tokens import load_tokenizer
from deltaray.data.tokens.chat import Message
from deltaray.data.tokens.render import rendered_ids
from deltaray.errors import UserError
from deltaray.failures import reason_of
from deltaray.model_files.fit import SCORING, misfit
from deltaray.recipe.scorers import RewardModel
from deltaray.runtime.process_watchdog import guarded
from deltaray.runtime.session import Capacity
from deltaray.runtime.stream import quiet_ray_data
from deltaray.score.files import Asked, Key, Unit, read_slices, write_scores
from deltaray.score.registry import section_of
from deltaray.score.response import Score, unscored


def reward_files(store: Store, units: list[Unit], capacity: Capacity) -> Iterator[dict[str, Any]]:
    """Scores the files, one pool of workers per scorer; yields what was counted in each."""
    import ray

    quiet_ray_data()
    for name in dict.fromkeys(unit["scorer"] for unit in units):
        todo = [{"unit": unit} for unit in units if unit["scorer"] == name]
        spec: RewardModel = section_of(todo[0]["unit"]["spec"])
        gpus = spec.gpus if spec.gpus is not None else float(capacity.gpus > 0)
        hidden = capacity.hidden_gpus(gpus)
        stream = ray.data.from_items(todo, override_num_blocks=len(todo)).map(
            guarded(RewardWorker),
            fn_constructor_args=(store, spec, f"scorers.{name}"),
            compute=ray.data.ActorPoolStrategy(size=min(spec.workers, len(todo))),
            num_cpus=spec.cpus,
            num_gpus=gpus or None,
            **({"runtime_env": {"env_vars": hidden}} if hidden else {}),
        )
        stream.set_name(f"rewards of {name}")
        yield from stream.iter_rows()


class RewardWorker:
    """One reward model, loaded."""

    def __init__(self, store: Store, spec: RewardModel, key: str) -> None:
        """Raises UserError if the model does not give one number."""
        import torch
        from transformers import AutoModelForSequenceClassification

        self.store, self.spec = store, spec
        self.tokenizer = load_tokenizer(spec, key)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        options = {"dtype": getattr(torch, spec.dtype), "trust_remote_code": spec.trust_remote_code}
        options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                spec.model, revision=spec.revision, **options
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{key}.model: {spec.model!r} is not a sequence classifier: {error}") from None
        if wrong := misfit(info, SCORING):
            raise UserError(f"{key}.model: {spec.model}: {wrong}")
        if model.config.num_labels != 1:
            raise UserError(
                f"{key}.model: {spec.model!r} gives {model.config.num_labels} numbers; name one that gives one"
            )
        self.model = model.eval().to(self.device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Commits the scores of one file."""
        unit = {**row["unit"], "spec": self.spec.model_dump(mode="json")}
        slices = read_slices(self.store, unit, messages=True)
        return write_scores(self.store, unit, map(partial(self._slice), slices))

    def _slice(self, part: list[Asked]) -> list[tuple[Key, Score]]:
        asked = [(key, [*it.messages, {"role": "assistant", "content": it.text}]) for key, it, _ in part if it]
        found = dict(zip([key for key, _ in asked], self.scores([turns for _, turns in asked]), strict=True))
        return [(key, Score(None, note) if it is None else found[key]) for key, it, note in part]

    def rewards(self, conversations: Sequence[Sequence[Message]]) -> list[float | None]:
        """The reward of each conversation, in order; what else is in a batch does not change it."""
        return [score.value for score in self.scores(conversations)]

    def scores(self, conversations: Sequence[Sequence[Message]]) -> list[Score]:
        """The score of each; one that the template, the tokenizer or the model refuses has none."""
        found: dict[int, Score] = {}
        ids: dict[int, list[int]] = {}
        for place, turns in enumerate(conversations):
            try:
                ids[place] = self._ids(turns)
            except BaseException as error:
                found[place] = unscored(error)
        order = sorted(ids, key=lambda place: -len(ids[place]))  # alike lengths waste least on padding
        for start in range(0, len(order), self.spec.batch_size):
            places = order[start : start + self.spec.batch_size]
            found |= dict(zip(places, self._scored([ids[place] for place in places]), strict=True))
        return [found[place] for place in range(len(conversations))]

    def _ids(self, turns: Sequence[Message]) -> list[int]:
        """Raises what the template or the tokenizer raises, and ValueError for a conversation without any token."""
        ids = rendered_ids(self.tokenizer, turns)[-self.spec.max_length :]
        if not ids:
            raise ValueError("the chat template makes no token of the conversation")
        return ids

    def _scored(self, ids: list[list[int]]) -> list[Score]:
        """Of a batch that the model does not take each row by itself."""
        try:
            return [Score(value) for value in self._batch(ids)]
        except BaseException as error:
            if len(ids) == 1:
                return [unscored(error)]
            reason_of(error)  # raises what concerns more than a row
        return [score for row in ids for score in self._scored([row])]

    def _batch(self, ids: list[list[int]]) -> list[float]:
        import torch

        # transformers finds a row's end by the padding's id, so it must be one that no row holds
        used = {token for row in ids for token in row}
        padding = next(token for token in range(len(used) + 1) if token not in used)
        self.model.config.pad_token_id = padding
        longest = len(ids[0])
        inputs = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in ids], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self.device)
        with torch.no_grad():
            logits = self.model(input_ids=inputs, attention_mask=mask).logits
        return [float(value) for value in logits[:, 0].float().tolist()]
