import socket

import httpx
import pytest

from aurora.standby import Standby
from serve.listen import bind


def test_it_answers_until_the_server_does() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
    standby = Standby(f"http://127.0.0.1:{port}")
    for method, path in (("GET", "/health"), ("POST", "/v1/chat/completions"), ("HEAD", "/"), ("DELETE", "/x")):
        answer = httpx.request(method, f"http://127.0.0.1:{port}{path}")
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "10"
    with bind("127.0.0.1", port, shared=True) as second:
        assert httpx.get(f"http://127.0.0.1:{port}").status_code == 503, "bound is not listening"
        second.listen()
        standby.close()
        standby.close()
        with socket.create_connection(("127.0.0.1", port)):
            second.settimeout(30)
            second.accept()[0].close()


def test_a_port_that_others_took_is_theirs() -> None:
    from aurora.config import UserError

    with bind("127.0.0.1", 0) as other:
        other.listen()
        port = other.getsockname()[1]
        Standby(f"http://127.0.0.1:{port}").close()
        Standby(f"https://127.0.0.1:{port}").close()
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            bind("127.0.0.1", port, shared=True)
