"""Where everything lies under `out`. No other module spells what begins with `.deltaray/`."""

PAIRS_PREFIX = "train-"
"""Of the files of pairs: `datasets` takes files with the name of a split alone, and leaves `_funnel.json` and
`_delta.json` beside them out, as all others do whatever the files are called."""


class Paths:
    """Paths relative to `out`. What begins with `.deltaray/` is for deltaray alone; users need not read it."""

    # --- what users read ----------------------------------------------------------------------------------------
    recipe = "recipe.yaml"
    report = "report.html"
    prompts = "prompts"

    @staticmethod
    def responses(teacher: str) -> str:
        return f"responses/teacher={teacher}"

    @staticmethod
    def scores(scorer: str, teacher: str) -> str:
        return f"scores/scorer={scorer}/teacher={teacher}"

    @staticmethod
    def references(student: str, teacher: str) -> str:
        return f"references/student={student}/teacher={teacher}"

    @staticmethod
    def pairs(pairing: str) -> str:
        return f"pairs/pairing={pairing}"

    @staticmethod
    def pair_shard(pairing: str, shard: str) -> str:
        """The pairs of a shard of prompts."""
        return f"{Paths.pairs(pairing)}/{PAIRS_PREFIX}{shard}.parquet"

    @staticmethod
    def funnel(pairing: str) -> str:
        """Where the pairs went."""
        return f"{Paths.pairs(pairing)}/_funnel.json"

    @staticmethod
    def student(name: str) -> str:
        return f"students/{name}"

    @staticmethod
    def adapter(name: str) -> str:
        return f"adapters/{name}"

    @staticmethod
    def training(name: str) -> str:
        return f"training/{name}"

    trials = "tuning/trials"
    """What is known of each trial of the exploration."""

    summary = "evaluation/summary.json"

    @staticmethod
    def evaluation(name: str) -> str:
        return f"evaluation/{name}.json"

    @staticmethod
    def evaluation_prompts(task: str) -> str:
        return f"evaluation/prompts/task={task}"

    @staticmethod
    def evaluation_responses(model: str, task: str) -> str:
        return f"evaluation/responses/model={model}/task={task}"

    @staticmethod
    def evaluation_scores(model: str, task: str) -> str:
        return f"evaluation/scores/model={model}/task={task}"

    @staticmethod
    def samples(model: str, task: str) -> str:
        """The sample log of a harness task, without its suffix."""
        return f"evaluation/samples/{model}/{task}"

    @staticmethod
    def sample_results(model: str, task: str) -> str:
        """Its results; no folder of Parquet files holds others, but that of pairs."""
        return f"evaluation/results/{model}/{task}.json"

    # --- prompts ------------------------------------------------------------------------------------------------
    preferences = ".deltaray/preferences.json"
    """What was read of a preference data set."""

    @staticmethod
    def prompts_record(folder: str) -> str:
        """Which file a folder of prompts was read from."""
        return f".deltaray/prompts/{folder.replace('/', '.')}.json"

    extensions_record = ".deltaray/extensions/record.json"
    origins = ".deltaray/extensions/origins"
    """The user's prompts, where some of them are extended before they become `prompts`."""

    @staticmethod
    def drawn(kind: str) -> str:
        """The prompts that are to be extended in one way."""
        return f".deltaray/extensions/drawn/kind={kind}"

    @staticmethod
    def extended(kind: str) -> str:
        """The conversations that they became."""
        return f".deltaray/extensions/written/kind={kind}"

    # --- responses ----------------------------------------------------------------------------------------------
    units = ".deltaray/units"
    """Units of responses that are complete, until their shard is."""

    archive = ".deltaray/superseded"
    """Responses that were made with earlier settings of their teacher, by the identity of these."""

    # --- scores and evaluation ----------------------------------------------------------------------------------
    @staticmethod
    def given(teacher: str) -> str:
        """The scores that a preference data set brought along."""
        return f".deltaray/given/teacher={teacher}"

    @staticmethod
    def questions(scorer: str, teacher: str) -> str:
        """What a judge is asked about a teacher's responses; deleted once they are scored."""
        return f".deltaray/questions/scorer={scorer}/teacher={teacher}"

    @staticmethod
    def judgements(scorer: str, teacher: str) -> str:
        """What it answered."""
        return f".deltaray/judgements/scorer={scorer}/teacher={teacher}"

    @staticmethod
    def evaluation_questions(model: str, task: str) -> str:
        """What a judge is asked about a model's answers."""
        return f".deltaray/questions/evaluation/model={model}/task={task}"

    @staticmethod
    def evaluation_judgements(model: str, task: str) -> str:
        """What it answered."""
        return f".deltaray/judgements/evaluation/model={model}/task={task}"

    @staticmethod
    def attempts(destination: str) -> str:
        """Tries at a file of responses whose scoring ended its process."""
        return f".deltaray/attempts/{destination}.json"

    @staticmethod
    def harness(model: str, task: str, identity: str) -> str:
        """What a harness task asks and is answered, until its results are there."""
        return f".deltaray/harness/model={model}/task={task}/{identity}"

    evaluated = ".deltaray/evaluated.json"
    """What the summary of the evaluation was made from."""

    # --- pairs --------------------------------------------------------------------------------------------------
    paired = ".deltaray/pairs"

    @staticmethod
    def paired_from(pairing: str) -> str:
        """What the pairs of a pairing were made from."""
        return f"{Paths.paired}/{pairing}.json"

    @staticmethod
    def prompt_filter(kind: str, digest: str) -> str:
        """The prompts that a filter removes."""
        return f".deltaray/prompt-filters/{kind}-{digest}.json"

    @staticmethod
    def tokens(student: str, teacher: str) -> str:
        """A teacher's responses in a student's tokens."""
        return f".deltaray/tokens/student={student}/teacher={teacher}"

    all_removed = ".deltaray/removed"

    @staticmethod
    def removed(pairing: str) -> str:
        """Which candidates of a pairing were removed, and by which rule."""
        return f"{Paths.all_removed}/pairing={pairing}"

    # --- training -----------------------------------------------------------------------------------------------
    train_state = ".deltaray/train"
    """Where Ray Train keeps its own state while it runs."""

    @staticmethod
    def trained_from(run: str) -> str:
        """What the pairs were made from that a student was trained on."""
        return f".deltaray/trained/{run}.json"

    @staticmethod
    def checkpoints(run: str) -> str:
        return f".deltaray/checkpoints/{run}"

    # --- the study ----------------------------------------------------------------------------------------------
    lock_file = ".deltaray/lock"
    logs = ".deltaray/logs"
    stages = ".deltaray/stages.jsonl"
    """One line for each stage that a command has run."""
    reported = ".deltaray/report.json"
    """What the report was made from."""
    calibration = ".deltaray/calibration.json"
    calibration_work = ".deltaray/calibration/work"
    """Where a calibration's prompts and responses lie meanwhile."""

    @staticmethod
    def definition_path(artifact: str) -> str:
        """What decides an artifact."""
        return f".deltaray/definitions/{artifact.replace('/', '.')}.json"
