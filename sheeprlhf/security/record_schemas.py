"""Schemas of the JSON files that this program writes and reads again. Imports no torch."""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from sheeprlhf.security.json_records import Count, Range, Schema, Time

Step = Annotated[int, Range(0, 10**12)]
_Positive = Annotated[float, Range(0, 1e300)]


class RunRecord(TypedDict):
    """run.json. Tasks add results of their own."""

    status: Literal["running", "finished"]
    started: Time
    order: NotRequired[Time]
    finished: NotRequired[Time | None]
    config_hash: NotRequired[str]
    data_fingerprint: NotRequired[str]
    task: NotRequired[str]
    model: NotRequired[str]
    data: NotRequired[str]
    run_name: NotRequired[str]
    command: NotRequired[list[str]]
    step: NotRequired[Step]
    best_metric: NotRequired[float | None]
    best_step: NotRequired[Step | None]
    stopped_early: NotRequired[bool]
    trackers: NotRequired[dict[str, str]]
    peak_memory: NotRequired[Count | None]


class StageRecord(TypedDict):
    """One stage in pipeline.json."""

    seconds: _Positive
    status: NotRequired[Literal["running", "finished", "failed", "stopped"]]
    command: NotRequired[list[str]]
    exit_code: NotRequired[int]


class PipelineRecord(TypedDict):
    """pipeline.json."""

    recipe: dict[str, list[str]]
    stages: dict[str, StageRecord]
    experiment: NotRequired[str | None]
    version: NotRequired[str]
    started: NotRequired[Time]
    order: NotRequired[Time]
    finished: NotRequired[Time]
    command: NotRequired[list[str]]


class FileRecord(TypedDict):
    """One file in MANIFEST.json."""

    size: Count
    sha256: str


class ManifestRecord(TypedDict):
    """MANIFEST.json."""

    format: int
    files: dict[str, FileRecord]
    sha256: str
    config_hash: NotRequired[str]
    step: NotRequired[Step]
    world_size: NotRequired[Annotated[int, Range(1, 10**6)]]
    torch_threads: NotRequired[Annotated[int, Range(1, 10**6)]]
    sharded: NotRequired[bool]
    device: NotRequired[str]


class ExtraRecord(TypedDict):
    """Additional state of tasks in state.json; see `TrainState.extra`."""

    kl_coeff: NotRequired[_Positive]
    reward_count: NotRequired[Count]
    reward_mean: NotRequired[float]
    reward_m2: NotRequired[_Positive]
    shard: NotRequired[Step]
    shard_step: NotRequired[Step]
    shard_digest: NotRequired[Annotated[int, Range(0, 2**48)]]


class StateRecord(TypedDict):
    """state.json of a checkpoint."""

    step: Step
    items_seen: Count
    best_metric: float | None
    best_step: Step | None
    extra: ExtraRecord
    skipped_steps: NotRequired[Step]  # older checkpoints lack these
    stale_validations: NotRequired[Count]


class SplitRecord(TypedDict):
    """One split in a data report; all other fields are counts, too."""

    read: Count
    kept: Count
    dropped: NotRequired[dict[str, Count]]
    first_dropped: NotRequired[dict[str, str]]
    truncated: NotRequired[dict[str, Count]]
    unused: NotRequired[dict[str, Count]]
    labels: NotRequired[dict[str, Count]]
    tokens: NotRequired[dict[str, dict[str, float]]]
    eos_share: NotRequired[float | None]
    templated_rows: NotRequired[Count]
    trained_tokens: NotRequired[Count]
    prompts_alone: NotRequired[Count]


class DataRecord(TypedDict):
    """Fields of both data reports."""

    splits: dict[str, SplitRecord]
    columns: NotRequired[dict[str, dict[str, Any]]]
    mix: NotRequired[list[dict[str, Any]]]


class DataReportRecord(DataRecord):
    """data_report.json of a run, also of an earlier version."""

    name: NotRequired[str]
    kind: NotRequired[str]
    notes: NotRequired[list[str]]


class PreparedRecord(DataRecord):
    """report.json of prepared data."""

    name: str
    kind: str
    notes: list[str]
    available_columns: dict[str, list[str]]


class ResultRecord(TypedDict):
    """A file of `eval/`. The figures are what else it holds."""

    task: NotRequired[str]
    split: NotRequired[str]
    data: NotRequired[str]
    model: NotRequired[str | None]
    weights: NotRequired[str]
    experiment_dir: NotRequired[str | None]
    time: NotRequired[str]
    version: NotRequired[str]


class BestRowRecord(TypedDict):
    """A line of `parts/` of task=best_of_n."""

    fate: Literal["kept", "cut", "low"]
    prompt: str
    response: str
    score: float
    n: Count
    mean_score: float
    first_score: float


RUN = Schema(
    RunRecord,
    "put back a copy, or delete {file} and give the run's training command again with hydra.run.dir={folder}, which "
    "continues from the newest checkpoint",
)
PIPELINE = Schema(PipelineRecord, "put back a copy, or start again without resume")
MANIFEST = Schema(ManifestRecord, "delete {folder}: the checkpoint before it is used")
STATE = Schema(StateRecord, "delete {folder}: the checkpoint before it is used")
DATA_REPORT = Schema(DataReportRecord, "delete {file}: a resumed run writes it again")
PREPARED = Schema(PreparedRecord, "delete {folder}: the data is prepared again")
DIGESTS = Schema(dict[str, str], "delete {folder}: the data is prepared again")
RESULT = Schema(ResultRecord, "delete {file} and run the evaluation again")
ADAPTER_CONFIG = Schema(dict[str, Any], "give another folder")
BEST_ROW = Schema(BestRowRecord, "delete {file}: a resumed run samples it again")
