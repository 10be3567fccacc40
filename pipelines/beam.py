"""How Beam is run: options, runner, the Arrow coder, and errors that people can read."""

import contextlib
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import (
    DebugOptions,
    DirectOptions,
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
    SetupOptions,
    StandardOptions,
    WorkerOptions,
    _BeamArgumentParser,
)
from apache_beam.portability.api import beam_provision_api_pb2 as provision
from apache_beam.runners.job import utils as job_utils
from apache_beam.runners.portability.flink_runner import MAGIC_HOST_NAMES
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo
from apache_beam.runners.runner import PipelineResult

from pipelines import dataset, remote, workers
from schemas.errors import UsageError, UserError

# what a worker raised, in the last line of a traceback
_SAID = re.compile(r"(?:UserError|UsageError|OSError|[A-Z]\w+Error: \[Errno \d+\]):? (.+)$", re.MULTILINE)
ONE_PROCESS = "no_use_multiple_sdk_containers"  # Dataflow's experiment: one worker process per machine
_LOCAL = "FnApiRunner"  # plain DirectRunner would try to download Prism, and then ignores direct_* options


class ArrowCoder(beam.coders.Coder):
    """Arrow tables as IPC streams: the default coder pickles a slice together with the whole table behind it."""

    def encode(self, value: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema) as writer:
            writer.write_table(value)
        return sink.getvalue().to_pybytes()

    def decode(self, encoded: bytes) -> pa.Table:
        return pa.ipc.open_stream(encoded).read_all()

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> type:
        return pa.Table


beam.coders.registry.register_coder(pa.Table, ArrowCoder)


# threads that pack row groups ask for Python's lock often, and would wait 5 ms each time
sys.setswitchinterval(0.0005)


def count(result: dict[str, Any]) -> dict[str, Any]:
    """Add a unit's outcome to Beam's counters, which every runner shows while it runs."""
    for name in ("inputs", "accepted", "duplicates"):
        Metrics.counter("una", name).inc(result[name])
    for reason, n in result["rejected"].items():
        Metrics.counter("una", f"rejected {reason}").inc(n)
    return result


def split_flags(argv: list[str], ours: set[str], start: str = "--") -> tuple[list[str], list[str]]:
    """Take the options that Beam knows and una does not, with their values, out of a command line."""
    known = _parser()._option_string_actions
    flags, rest, i = [], [], 0
    while i < len(argv):
        name, equals, _ = argv[i].partition("=")
        takes = 1
        if name in known and name not in ours and name.startswith(start):
            takes += 0 if equals or known[name].nargs == 0 else 1
            flags += argv[i : i + takes]
        else:
            rest.append(argv[i])
        i += takes
    return flags, rest


def _parser() -> _BeamArgumentParser:
    parser = _BeamArgumentParser(allow_abbrev=False)
    for cls in {str(c): c for c in PipelineOptions.__subclasses__()}.values():
        cls._add_argparse_args(parser)
    return parser


def check(flags: list[str], *paths: str) -> None:
    """`UsageError` for options that no pipeline can run with, or not on `paths`, which all workers must reach; called
    before anything is read or written."""
    chosen, runner = _chosen(flags)
    try:
        beam.Pipeline(runner=runner, options=chosen)
    except (ValueError, ImportError, AttributeError, RuntimeError, TypeError) as error:
        raise UsageError(f"Beam's options: {error}") from None
    if (chosen.view_as(DirectOptions).direct_num_workers or 0) < 0:
        raise UsageError("--direct_num_workers: must not be negative")
    if on_dataflow(flags):
        _check_dataflow(chosen, paths)
    elif template_of(flags):
        raise UsageError("--template_location: only DataflowRunner makes templates; add --runner DataflowRunner")


def _check_dataflow(chosen: PipelineOptions, paths: tuple[str, ...]) -> None:
    """What Dataflow itself would tell after minutes, from machines that it started."""
    if local := next((path for path in paths if not remote.is_remote(path)), None):
        raise UsageError(
            f"{local}: lies on this machine, and Dataflow's workers are others; copy it to gs:// and name that path"
        )
    if not chosen.view_as(WorkerOptions).sdk_container_image:
        raise UsageError(
            "--runner DataflowRunner: the workers need an image with una in it; build the target `dataflow` of the "
            "Dockerfile, push it, and name it with --sdk_container_image"
        )
    try:
        from apache_beam.runners.dataflow.internal import apiclient  # noqa: F401 - the runner imports it when it runs
    except ImportError:
        raise UsageError("--runner DataflowRunner: needs more packages: pip install 'una-align[gcp]'") from None


def on_dataflow(flags: list[str]) -> bool:
    return (PipelineOptions(flags).view_as(StandardOptions).runner or "").rsplit(".", 1)[-1] == "DataflowRunner"


def template_of(flags: list[str]) -> str | None:
    """Where the job is to be written instead of being run: how a Flex Template's launcher starts a pipeline."""
    return PipelineOptions(flags).view_as(GoogleCloudOptions).template_location


def across_processes(flags: list[str]) -> bool:
    """Whether several worker processes of a machine should share one model; Dataflow by itself starts one per core."""
    chosen = PipelineOptions(flags)
    one_per_core = on_dataflow(flags) and not chosen.view_as(DebugOptions).lookup_experiment(ONE_PROCESS)
    return one_per_core or chosen.view_as(DirectOptions).direct_running_mode == "multi_processing"


def shares_disk(flags: list[str]) -> bool:
    """Whether all workers run on this machine."""
    chosen, runner = _chosen(flags)
    if isinstance(runner, FnApiRunner):
        return True
    name, asked = runner.rsplit(".", 1)[-1], chosen.view_as(PortableOptions).environment_type
    at_home = name == "PrismRunner" or (
        name == "FlinkRunner" and chosen.view_as(FlinkRunnerOptions).flink_master in MAGIC_HOST_NAMES
    )
    return asked == "LOOPBACK" or (at_home and not asked)  # then it is Beam's choice as well


def _chosen(flags: list[str]) -> tuple[PipelineOptions, str | FnApiRunner]:
    chosen = PipelineOptions(flags)
    chosen.view_as(SetupOptions).save_main_session = False  # all that workers call lies in modules
    runner = chosen.view_as(StandardOptions).runner or _LOCAL
    if "dask" in runner.lower():
        raise UsageError("--runner DaskRunner: refused, it loses data silently and still reports success")
    if runner.rsplit(".", 1)[-1].lower() in ("directrunner", "bundlebaseddirectrunner"):
        runner = _LOCAL
    return chosen, _local(chosen) if runner == _LOCAL else runner


def _local(chosen: PipelineOptions) -> FnApiRunner:
    """Beam's local runner, whose worker processes are una's and are told the options of the stores."""
    of_stores = {k: v for k, v in chosen.get_all_options(drop_default=True).items() if k.startswith("s3_")}
    told = job_utils.dict_to_struct({f"beam:option:{name}:v1": value for name, value in of_stores.items()})
    provisions, environment = ExtendedProvisionInfo(provision.ProvisionInfo(pipeline_options=told)), None
    if (direct := chosen.view_as(DirectOptions)).direct_running_mode == "multi_processing":
        direct.direct_running_mode = "in_memory"  # with the other name Beam would start workers of its own
        environment = workers.environment()
    return FnApiRunner(environment, provision_info=provisions)


def run(build: Callable[[beam.Pipeline], object], flags: list[str]) -> None:
    """Build a pipeline and run it with Beam's `flags`; what a worker raised as `UserError` is raised here as one."""
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # what it logs as errors is also raised, below
    _tell_of_dataflow()
    chosen, runner = _chosen(flags)
    try:
        pipeline = beam.Pipeline(runner=runner, options=chosen)
        build(pipeline)
        result = pipeline.run()
        state = None if template_of(flags) else _wait(result)
    except Exception as error:
        raise _readable(error) from error
    if state not in ("DONE", None):
        raise UserError(f"the pipeline ended as {state}; see the runner's log")


def _tell_of_dataflow() -> None:
    """Let Beam tell the page of the job, its states and what the service says, and no more."""
    logging.getLogger("apache_beam.runners.dataflow.dataflow_runner").setLevel(logging.INFO)
    client = logging.getLogger("apache_beam.runners.dataflow.internal.apiclient")
    client.setLevel(logging.INFO)
    if not client.filters:
        client.addFilter(lambda record: "monitoring console" in str(record.msg))


def _wait(result: PipelineResult) -> str | None:
    """The state that the job ends in; one that runs elsewhere ends too when this process is told to."""
    try:
        return result.wait_until_finish()
    except KeyboardInterrupt:
        with contextlib.suppress(Exception):
            result.cancel()
        raise


def once(pipeline: beam.Pipeline, function: Callable[..., None], *collections: beam.PCollection, **facts: Any) -> Any:
    """Call `function(list, …, **facts)` one time, with everything each collection holds, when all of it is there."""
    lists = [beam.pvalue.AsList(c) for c in collections]
    return (
        pipeline
        | "once" >> beam.Create([None])
        | "commit" >> beam.Map(lambda _, *found: function(*found, **facts), *lists)
    )


def run_stage(
    build: Callable[[beam.Pipeline], object], flags: list[str], stage: str, output: str, max_rejected: float = 1.0
) -> dict[str, Any]:
    """Run a stage's pipeline, print and return its summary; when it fails, nothing is left of it."""
    with dataset.staged(stage, kept=bool(template := template_of(flags))):
        run(build, flags)
    if template:
        print(f"{template}: the job, which writes {output} once it is launched")
        return {"output": output, "template": template}
    report = dataset.summary(dataset.read_manifest(output), output, max_rejected)
    dataset.print_summary(report)
    return report


def _readable(error: Exception) -> BaseException:
    """The `UserError`, interrupt or disk-full error inside Beam's chain of wrapped texts, else the error itself."""
    text = str(error)
    if re.search(r"^KeyboardInterrupt\b", text, re.MULTILINE):
        return KeyboardInterrupt()
    if workers.LOST in text:
        return UserError(
            "a worker process ended in the middle of its work: it was killed, or had too little memory; run again, "
            "with fewer --direct_num_workers if memory is short"
        )
    if isinstance(error, UserError | UsageError):
        return type(error)(re.sub(r" \[while running .*?\]$", "", text))
    if found := _SAID.findall(text):
        message = re.sub(r" \[while running .*?\]$", "", found[-1])
        if "No space left on device" in message:
            return UserError("no space left on the disk; nothing was left behind, free some and run again")
        return UserError(message)
    return error
