"""`dalle2-fast demo` on the command line: what it says before any page is open."""

from __future__ import annotations

import socket
import sys

import pytest

from dalle2_fast.cli import main


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    """Catches: a traceback, or a bare "No module named gradio"."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo"]) == 2
    assert 'pip install "dalle2_fast[demo]"' in capsys.readouterr().err


def test_a_port_in_use_is_an_error_before_the_weights_load(monkeypatch, capsys):
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    from dalle2_fast import DALLE2

    monkeypatch.setattr(DALLE2, "from_pretrained", lambda *_, **__: pytest.fail("the weights were loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 2
    assert f"--host, --port: cannot serve at 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--port", "70000"], ["--batch-size", "0"], ["--dtype", "fp8"]])
def test_wrong_options(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["demo", *words])
    assert end.value.code == 2 and words[0] in capsys.readouterr().err
