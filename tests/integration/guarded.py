"""A server that asks for a key, and clients that have it."""

from pathlib import Path

import httpx
import openai

from aurora.local_server import LocalServer
from tests.integration.conftest import SMALL
from tests.integration.process import START_LIMIT_S

KEY = "key-that-must-be-in-no-log"
FLAGS = ("--no-learning", "--draft-vocab=256", "--set=reporter.interval_s=0.5", *SMALL, "--max-num-seqs=4")


class Guarded(LocalServer):
    """A server with a key, and clients that have it."""

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)

    def model(self) -> str:
        """The name of what it serves."""
        return self.client().models.list().data[0].id

    def post(self, body: object, path: str = "/v1/completions", timeout: float = 120) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=timeout)

    def ray_logs(self) -> list[Path]:
        """What Ray's processes of this server wrote."""
        words = [word for process in self.processes() for word in process.cmdline()]
        session = next(word.split("=", 1)[1] for word in words if word.startswith(("--session_dir=", "--session-dir=")))
        return list(Path(session).glob("logs/*"))


def start_guarded(model: Path, directory: Path, *flags: str, keys: str = KEY) -> Guarded:
    """One that answers; its key file and run directory lie in `directory`."""
    (directory / "keys").write_text(keys)
    server = Guarded(str(model), directory / "run", (*FLAGS, f"--api-key-file={directory / 'keys'}", *flags))
    server.wait_ready(START_LIMIT_S)
    return server
