"""What is told of the machine names no user, host or folder."""

import getpass
import json
import platform
import socket
from pathlib import Path

import jax

from lmlab.report.environment import PACKAGES, describe_environment


def test_the_description_says_what_computed():
    facts = describe_environment()
    assert facts["jax"] == jax.__version__
    assert facts["python"] == platform.python_version()
    assert facts["devices"].startswith("8 x ")
    assert {"lmlab", "processor", "cores", "platform", *PACKAGES} <= facts.keys()
    assert all(isinstance(value, str) and value for value in facts.values())


def test_it_names_no_user_host_or_folder(monkeypatch):
    private = {getpass.getuser(), socket.gethostname(), platform.node(), str(Path.home()), str(Path.cwd())}
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setenv("USER", "secret-user")
    monkeypatch.setenv("HOME", "/secret/home")
    text = json.dumps(describe_environment())
    assert "secret" not in text
    assert [name for name in private if len(name) > 2 and name in text] == []
    # Nor a folder of any other kind: no word of it is a path.
    words = text.replace('"', " ").split()
    assert [word for word in words if word.startswith(("/", "~/")) and len(word) > 1] == []
