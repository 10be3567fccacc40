"""The worker processes of Beam's local runner: how they are started, watched and ended."""

import os
import shlex
import subprocess
import sys
import threading
from typing import Any

from apache_beam.portability import python_urns
from apache_beam.portability.api import endpoints_pb2
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from apache_beam.transforms.environments import SubprocessSDKEnvironment
from google.protobuf import json_format, text_format

from pipelines import processes

LOST = "Channel closed prematurely"  # what Beam raises as well when a worker is gone


def environment() -> SubprocessSDKEnvironment:
    """Where the steps of a pipeline run: in workers of this process."""
    return SubprocessSDKEnvironment.from_command_string(processes.worker_command())


@worker_handlers.WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)
class Worker(worker_handlers.GrpcWorkerHandler):
    """A worker, instead of Beam's own: that waits for ever for one which ends before it has called, and, when a run is
    interrupted, for what the others are at."""

    def __init__(self, command: bytes, *about: Any):
        super().__init__(*about)
        self.command, self.closed = shlex.split(command.decode()), threading.Event()

    def start_worker(self) -> None:
        control = endpoints_pb2.ApiServiceDescriptor(url=self.control_address)
        told = {
            "CONTROL_API_SERVICE_DESCRIPTOR": text_format.MessageToString(control),
            "PIPELINE_OPTIONS": json_format.MessageToJson(self.provision_info.provision_info.pipeline_options),
            "WORKER_ID": self.worker_id,
        }
        self.process = subprocess.Popen(self.command, env={**os.environ, **told})
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Tell whoever waits for data or an answer of a worker that has failed."""
        if self.process.wait() and not self.closed.is_set():
            self.data_conn.close()
            while not self.closed.wait(0.2):
                self.control_conn.abort(RuntimeError(LOST))

    def close(self) -> None:
        self.closed.set()
        if sys.exc_info()[0] is not None:  # the run has failed, or was interrupted
            self.process.kill()
        super().close()

    def stop_worker(self) -> None:
        self.process.wait()
