"""Static batching, as in TorchServe's large-model examples.

Up to eight requests that are received within 100 ms form a batch. It is generated as a whole until
its longest output is complete, while the next batch waits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.cache import Unavailable, cached, packages
from benchmarks.client import Dialect, TorchServePredictions
from benchmarks.model import model_folder
from benchmarks.servers.base import Launch, executable, free_port

VERSION = "0.12.0"
MODEL = "bench"
BATCH_SIZE, BATCH_DELAY_MS = 8, 100
TIMEOUT_S = 3600
HANDLER = Path(__file__).with_name("torchserve_handler.py")


class TorchServe:
    """TorchServe with one worker, and this environment's torch and transformers."""

    ready_path = "/ping"

    def __init__(self, name: str) -> None:
        self.name = name
        self._packages = self._folder = Path()

    def dialect(self) -> Dialect:
        """Predictions, without streaming."""
        return TorchServePredictions(MODEL)

    def prepare(self) -> str:
        """Install TorchServe and write its model folder. Raises: Unavailable without Java."""
        if shutil.which("java") is None:
            raise Unavailable("TorchServe needs Java 17")
        self._packages = packages("torchserve", f"torchserve=={VERSION}", options=("--no-deps",))
        self._folder = cached("torchserve", _write_model_store)
        return VERSION

    def launch(self, port: int, *, threads: int, concurrency: int) -> Launch:
        """One worker with the given number of threads, and no system metrics."""
        config = self._folder / "config.properties"
        config.write_text(
            f"inference_address=http://127.0.0.1:{port}\n"
            f"management_address=http://127.0.0.1:{free_port()}\n"
            f"metrics_address=http://127.0.0.1:{free_port()}\n"
            f"load_models={MODEL}\n"
            "disable_token_authorization=true\n"
            "disable_system_metrics=true\n"
        )
        command = [executable("python"), "-m", "ts.model_server", "--start", "--foreground"]
        command += ["--ncs", "--disable-token-auth", "--ts-config", str(config)]
        command += ["--model-store", str(self._folder / "models")]
        return Launch(
            command,
            {
                "PYTHONPATH": str(self._packages),
                "OMP_NUM_THREADS": str(threads),
                "BENCH_MODEL": str(model_folder()),
                "TMPDIR": str(self._folder),  # the folder of its pid file
                "LOG_LOCATION": str(self._folder / "logs"),
                "METRICS_LOCATION": str(self._folder / "logs"),
            },
            cwd=self._folder,
        )


def _write_model_store(folder: Path) -> None:
    """Write the model as a folder with the layout of an unpacked archive."""
    model = folder / "models" / MODEL
    (model / "MAR-INF").mkdir(parents=True)
    shutil.copy(HANDLER, model)
    manifest = {
        "runtime": "python",
        "archiverVersion": VERSION,
        "model": {
            "modelName": MODEL,
            "modelVersion": "1.0",
            "handler": HANDLER.name,
            "configFile": "model-config.yaml",
        },
    }
    (model / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    (model / "model-config.yaml").write_text(
        f"minWorkers: 1\nmaxWorkers: 1\nbatchSize: {BATCH_SIZE}\nmaxBatchDelay: {BATCH_DELAY_MS}\n"
        f"responseTimeout: {TIMEOUT_S}\nstartupTimeout: {TIMEOUT_S}\n"
    )
