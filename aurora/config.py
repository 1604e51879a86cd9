"""The configuration tree: frozen, typed, unknown keys refused. Flags override a YAML file, which overrides defaults."""

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from aurora.config_errors import explain

DEFAULT_MODEL = "smollm2-135m-instruct"


class UserError(ValueError):
    """A mistake a user can fix; the message names what is wrong and what to do."""


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the key, the value and the remedy."""


def require_positive(options: object, *names: str) -> None:
    """Raise UserError naming the flag of the first of these fields that is not above 0; None passes."""
    for name in names:
        value = getattr(options, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(number is None or number > 0 for number in numbers):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0")


def require_writable(flag: str, file: Path | None) -> None:
    """Raise UserError unless `file` can be written later: before long work, not after it. None passes."""
    if file is None:
        return
    parent = file.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{flag} {file}: no such directory; create it first")
    if file.is_dir() or not os.access(file if file.exists() else parent, os.W_OK):
        raise UserError(f"{flag} {file}: cannot be written; give another file")


class _Branch(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def cache_root() -> Path:
    """Where everything that can be made again is kept, unless `cache_dir` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aurora"


class ServerConfig(_Branch):
    """The HTTP endpoint and the engine behind it."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key_file: Path | None = Field(None, description="file with one API key a line; AURORA_API_KEY works too")
    num_cpus: float | None = Field(
        None, gt=0, description="Ray CPUs of the server; on a cluster also cores of its engine"
    )
    num_gpus: float = Field(0, ge=0, description="Ray GPUs of the server")
    start_timeout_s: float = Field(900, gt=0, description="a server that has not started by then is given up")
    insecure: bool = Field(False, description="listen beyond this machine without an API key, use an open Ray cluster")
    drain_s: float = Field(30, ge=0, description="time that open requests have to finish after a stop")
    hang_s: float = Field(300, gt=0, description="an engine that takes longer than that for a step is started anew")


class LimitsConfig(_Branch):
    """What the server takes on; what is beyond is refused at once."""

    body_kib: int = Field(8192, ge=1, description="size of a request's body (413 beyond)")
    header_kib: int = Field(64, ge=1, description="size of a request's line and headers together (431 beyond)")
    waiting: int | None = Field(
        None, ge=0, description="open requests beyond those that the engine runs at once (503 beyond); default: as many"
    )
    request_s: float = Field(3600, gt=0, description="longest time of a request, waiting included (504 beyond)")
    n: int = Field(64, ge=1, description="answers that a request may ask for (400 beyond)")


Objective = Literal["goodput", "latency", "slo"]


class SpeculationConfig(_Branch):
    """Drafting and the choice of its length."""

    enabled: bool = Field(True, description="false: decode plainly")
    k_max: int = Field(4, ge=1, le=16, description="longest draft; the engine reserves KV slots for it")
    fixed_k: int | None = Field(None, ge=0, le=16, description="same k for every request instead of the goodput rule")
    objective: Objective = Field(
        "goodput",
        description="what the rule maximises: tokens a second, the time a token takes a request, deadlines kept",
    )
    token_deadline_ms: float | None = Field(
        None, gt=0, description="time between tokens that each request is owed (objective slo); it may name its own"
    )
    drafters: tuple[Literal["eagle3", "ngram", "model"], ...] = Field(
        ("eagle3", "ngram"),
        min_length=1,
        description="what drafts: the neural drafter, the table of served text, a small draft model",
    )
    ngram_mib: int = Field(512, ge=1, description="bound of the n-gram tables over finished requests")
    isolate_tenants: bool = Field(True, description="never draft text from requests with another `cache_salt`")
    cluster_domains: bool = Field(False, description="sort requests without a domain label by their prompts")
    drafter: Path | None = Field(None, description="drafter directory to start from; default: made from the target")
    draft_vocab: int = Field(8192, ge=256, description="tokens that the drafter can propose")
    draft_layers: int = Field(2, ge=1, description="layers of the draft model, taken from the target at first")
    sample_drafts: Literal["greedy", "probabilistic"] = Field(
        "greedy", description="how the neural drafter picks tokens for requests that sample"
    )
    calibrate: bool = Field(True, description="measure step costs at the first start with a model, machine and flags")
    exploration: float = Field(0.01, ge=0, le=0.5, description="share of the engine's steps lost to exploring")
    step_log: Path | None = Field(None, description="file that gets a line for each step: work, time, tokens; no text")

    @field_validator("step_log")
    @classmethod
    def _step_log_has_a_place(cls, file: Path | None) -> Path | None:
        if file is None:
            return None
        file = file.expanduser().absolute()
        if not file.parent.is_dir():
            raise ValueError(f"step_log {file}: no such directory; make {file.parent} or name another file")
        return file

    @model_validator(mode="after")
    def _fixed_within_max(self) -> "SpeculationConfig":
        if self.fixed_k is not None and self.fixed_k > self.k_max:
            raise ValueError(f"fixed_k {self.fixed_k} exceeds k_max {self.k_max}: raise k_max or lower fixed_k")
        return self

    @model_validator(mode="after")
    def _objective_has_its_say(self) -> "SpeculationConfig":
        if self.fixed_k is not None and self.objective != "goodput":
            raise ValueError(f"objective {self.objective} and fixed_k {self.fixed_k}: leave one of them out")
        if self.token_deadline_ms is not None and self.objective != "slo":
            raise ValueError(f"token_deadline_ms {self.token_deadline_ms}: objective must be slo for it to matter")
        return self


class CaptureConfig(_Branch):
    """Traces from the engine to the trainer."""

    sink_mib: int = Field(
        256, ge=1, description="bound of the traces in the engine, and again of those that wait for the trainer"
    )
    prompt_tokens: int = Field(256, ge=0, description="newest prompt tokens of each request whose features are kept")
    codec: Literal["bf16", "int8", "compact", "tiny"] = Field(
        "compact", description="form of the target's states in traces"
    )
    top_m: int = Field(8, ge=0, le=64, description="drafter probabilities kept a draft when drafts are sampled")
    interval_s: float = Field(0.5, gt=0, description="how often traces are collected from the engine")
    log_dir: Path | None = Field(None, description="keep the traces there, for `aurora train`; they hold users' text")
    log_mib: int = Field(4096, ge=1, description="bound of the logged traces; the oldest are removed")
    log_days: float | None = Field(30, gt=0, description="age at which logged traces are removed; null: any")


class RLConfig(_Branch):
    """Policy gradient on verified drafts, beside imitation (`trainer.policy`)."""

    weight: float = Field(
        0.0, ge=0, le=1, description="share of the policy gradient in the loss after the ramp; 0: off"
    )
    after_steps: int = Field(200, ge=0, description="steps of imitation alone")
    ramp_steps: int = Field(200, ge=1, description="steps over which the share then rises to `weight`")
    discount: float = Field(1.0, gt=0, le=1, description="of a later accepted token")
    clip: float = Field(0.2, gt=0, lt=1, description="how far the importance ratio may leave 1 (PPO)")
    anchor: float = Field(0.1, ge=0, description="weight of KL(drafter || target) at the drafted tokens")


class TrainerConfig(_Branch):
    """Online distillation."""

    enabled: bool = Field(True, description="false: serve without a trainer")
    learning_rate: float = Field(5e-4, gt=0, description="of the optimiser, after the warm-up")
    warmup_steps: int = Field(20, ge=1, description="steps over which the learning rate rises from 0")
    loss: Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "accepted_length"] = Field(
        "forward_kl", description="what imitation minimises, a row"
    )
    target_top_m: int = Field(0, ge=0, description="distil from the target's m likeliest tokens and one rest; 0: all")
    ttt_steps: int = Field(3, ge=1, le=16, description="training-time-test depth: steps on the drafter's own states")
    depth_decay: float = Field(0.8, gt=0, le=1, description="loss weight of depth j is depth_decay ** j")
    accepted_weight: float = Field(1.0, ge=0, description="loss weight of rows along what the target emitted")
    rejected_weight: float = Field(0.0, ge=0, description="loss weight of rows on rejected branches; 0 leaves them out")
    rl: RLConfig = RLConfig()
    batch_rows: int = Field(256, ge=8, description="rollout starts an optimiser step")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of a step's gradient")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of matrix products; weights stay fp32")
    replay_mib: int = Field(1024, ge=8, description="bound of the replay; the oldest sequences leave first")
    max_staleness: int = Field(8, ge=0, description="versions after which drafts no longer count as on-policy")
    holdout: float = Field(0.1, gt=0, lt=0.5, description="share of requests kept out of training for the gate")
    draft_model_share: float = Field(
        0.5, gt=0, lt=1, description="share of training time that the draft model gets beside the neural drafter"
    )
    publish_interval_s: float = Field(60, gt=0, description="time between candidate drafters")
    gate_sequences: int = Field(16, ge=1, description="newest held-out requests on which a candidate is judged")
    gate_margin: float = Field(0.0, description="acceptance length that a candidate must gain over the live drafter")
    revocab_gain: float = Field(0.005, gt=0, description="coverage that a new draft vocabulary must add to be adopted")
    checkpoint_interval_s: float = Field(60, gt=0, description="time between checkpoints of the trainer")
    workers: int = Field(1, ge=1, description="processes that share the steps of eagle3, each with its own threads")
    sharded: bool = Field(False, description="with several workers: a shard of weights and moments on each (FSDP2)")
    worker_timeout_s: float = Field(60, gt=0, description="silence after which a worker counts as lost")
    threads: int = Field(1, ge=1, description="CPU threads of the trainer")
    nice: int = Field(19, ge=0, le=19, description="scheduling priority of the trainer process; 19 is the lowest")
    duty: float = Field(0.5, gt=0, le=1, description="share of wall time to compute in while requests are open")
    drift_duty: float = Field(1.0, gt=0, le=1, description="the same after drift, until the drafter has caught up")
    drift_limit_s: float = Field(600, gt=0, description="longest time that drift raises the share")
    num_gpus: float = Field(0, ge=0, description="Ray GPUs of the trainer")
    keep_versions: int = Field(8, ge=2, description="drafter versions kept in the store; older ones are removed")
    seed: int = Field(0, description="of the trainer's draws")

    @property
    def learns_rejected(self) -> bool:
        """Whether rejected paths count: the accepted length of a rollout says nothing of them."""
        return self.rejected_weight > 0 and self.loss != "accepted_length"

    @model_validator(mode="after")
    def _something_counts(self) -> "TrainerConfig":
        if self.accepted_weight == 0 and not self.learns_rejected:
            raise ValueError("accepted_weight 0 leaves nothing to imitate: raise it, or rejected_weight")
        return self

    @model_validator(mode="after")
    def _shards_have_places(self) -> "TrainerConfig":
        if self.sharded and self.workers == 1:
            raise ValueError("sharded: there is one worker only; set trainer.workers, or leave it out")
        return self

    @model_validator(mode="after")
    def _drift_raises(self) -> "TrainerConfig":
        if self.drift_duty < self.duty:
            raise ValueError(f"drift_duty {self.drift_duty} is below duty {self.duty}: raise drift_duty or lower duty")
        return self


class ReporterConfig(_Branch):
    """What is reported, and where to."""

    mode: Literal["offline", "online", "disabled"] = Field(
        "offline", description="offline writes to RUN_DIR/wandb, online reports live, disabled starts no Reporter"
    )
    sink: Literal["wandb", "tensorboard", "jsonl"] = Field("wandb", description="where to report")
    project: str = Field("aurora", description="W&B project")
    interval_s: float = Field(5, gt=0, description="time between rows of serving")
    artifacts: Literal["off", "reference", "files"] = Field(
        "reference", description="of published drafters in W&B: their checksums and where they lie, or their files"
    )
    alert_s: float = Field(900, gt=0, description="shortest time between two alerts of a kind")
    draft_tables: bool = Field(False, description="report some verified drafts as text: it is users' text")


class ClusterConfig(_Branch):
    """The Ray cluster."""

    address: str | None = Field(None, description="'auto' or HOST:PORT joins a running cluster; default: a local one")
    replicas: int = Field(1, ge=1, le=256, description="servers behind one endpoint, each with an engine of its own")
    router: Literal["round_robin", "least_loaded", "earliest_finish"] = Field(
        "earliest_finish", description="which replica answers a request"
    )
    canary_s: float = Field(
        120, gt=0, description="longest time that one replica tries a new drafter version before the others take it"
    )
    transport: Literal["shared", "ray"] = Field(
        "shared",
        description="how drafters reach the servers: run_dir is a directory that all nodes see, or through Ray",
    )
    local_dir: Path | None = Field(
        None, description="a node's own directory for the drafters that come through Ray; default: RUN_DIR/mirror"
    )
    fetch_mib_s: float | None = Field(None, gt=0, description="MiB a second that they may take; default: no bound")

    @field_validator("local_dir")
    @classmethod
    def _same_everywhere(cls, directory: Path | None) -> Path | None:
        if directory is not None and not directory.expanduser().is_absolute():
            raise ValueError("must be an absolute path: nodes start in directories of their own")
        return directory

    wait_s: float = Field(0, ge=0, description="time that nodes with the resources serve and train have to join")


class AuroraConfig(_Branch):
    """Everything that one deployment of Aurora is told."""

    model: str = Field(DEFAULT_MODEL, min_length=1, description="local directory, hub name or the default model")
    run_dir: Path = Field(Path("runs/default"), description="drafter store, checkpoints and W&B files")
    cache_dir: Path = Field(
        default_factory=cache_root, description="what can be made again: the default model, step costs"
    )
    vllm_args: tuple[str, ...] = Field((), description="flags passed to vLLM as they are")
    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    capture: CaptureConfig = CaptureConfig()
    trainer: TrainerConfig = TrainerConfig()
    reporter: ReporterConfig = ReporterConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def learning(self) -> bool:
        """Whether a trainer runs: there is nothing to teach a table."""
        return self.trainer.enabled and self._drafts_neurally

    @property
    def captures(self) -> bool:
        """Whether traces are taken from the engine."""
        return self.learning or self.capture.log_dir is not None

    @property
    def _drafts_neurally(self) -> bool:
        return self.speculation.enabled and set(self.speculation.drafters) != {"ngram"}

    @model_validator(mode="after")
    def _workers_have_work(self) -> "AuroraConfig":
        if self.trainer.workers > 1 and "eagle3" not in self.speculation.drafters:
            raise ValueError(
                f"trainer.workers {self.trainer.workers}: only eagle3 is trained by several; leave it at 1"
            )
        return self

    @model_validator(mode="after")
    def _log_has_traces(self) -> "AuroraConfig":
        if self.capture.log_dir is not None and not self._drafts_neurally:
            raise ValueError("capture.log_dir: there are traces of neural drafters only; enable eagle3 or unset it")
        return self

    @property
    def store_dir(self) -> Path:
        return self.run_dir / "drafters"

    @property
    def draft_model_dir(self) -> Path:
        return self.run_dir / "draft_models"

    @property
    def routed(self) -> bool:
        """Whether a Router has the endpoint: it is beside `aurora serve`, while a Server of a cluster is anywhere."""
        return self.cluster.replicas > 1 or self.cluster.address is not None

    @property
    def ships_drafters(self) -> bool:
        """Whether drafters reach the servers through Ray; without a trainer there are none to bring."""
        return self.cluster.transport == "ray" and self.learning

    def mirrored(self, replica: str) -> "AuroraConfig":
        """This one with its stores in a directory of the node and of one server."""
        directory = self.cluster.local_dir or self.run_dir / "mirror"
        return self.model_copy(update={"run_dir": directory.expanduser() / replica})


def load_config(file: Path | None, overrides: dict[str, Any]) -> AuroraConfig:
    """Merge defaults, a YAML file and dotted overrides such as `{"server.port": 8001}` (None values are unset flags).

    Raises ConfigError naming the key and the value that is wrong.
    """
    tree = _read_yaml(file) if file is not None else {}
    for dotted, value in overrides.items():
        if value is not None:
            _set(tree, dotted, value)
    try:
        return AuroraConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, AuroraConfig, file)) from error


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}; give an existing YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: not valid YAML: {' '.join(str(error).split())}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"--config {file}: expected a mapping at the top, got {type(tree).__name__}")
    return tree or {}


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *branches, leaf = dotted.split(".")
    for name in branches:
        child = tree.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{name}: expected a mapping, got {child!r}")
        tree = child
    tree[leaf] = value
