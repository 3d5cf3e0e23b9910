"""scripts/bootstrap.sh on a machine that has nothing: a clean root made by debootstrap, where only the first run changes it."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bootstrap.sh"
MIRROR = os.environ.get("TRAINWAY_DEBIAN_MIRROR", "http://deb.debian.org/debian")
DIRECTORY = "/root/my $(touch x);'\" repo"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        pytest.skip("needs debootstrap and root")
    root = tmp_path / "root"
    words = ["debootstrap", "--variant=minbase", "bookworm", str(root), MIRROR]
    made = subprocess.run(words, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"debootstrap fails here: {made.stdout.splitlines()[-1:]}")
    yield root
    shutil.rmtree(root, ignore_errors=True)


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in the root, with an environment of its own: only what tells pip and apt where packages are goes on."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PIP_") or "proxy" in name.lower()
    }
    env = {**kept, "HOME": "/root", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    words = ["chroot", str(root), "sh", "/root/bootstrap.sh", *arguments]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=1500)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_bare_machine_becomes_ready_once(root: Path) -> None:
    shutil.copy(SCRIPT, root / "root" / "bootstrap.sh")
    write_wheel(root / "root" / "trainway-0.0-py3-none-any.whl")
    make_repository(root / "root" / "repo.git")
    for name in ("git", "tmux", "vim", "ssh-keygen", "rsync", "python3"):
        assert not (root / "usr" / "bin" / name).exists()  # it is a bare one

    words = ["--repo", "file:///root/repo.git", "--dir", DIRECTORY]
    words += ["--source", "/root/trainway-0.0-py3-none-any.whl"]
    first = run(root, *words, "--data", "/root/bootstrap.sh")
    assert first.returncode == 0, first.stderr
    assert "ssh-ed25519 AAAA" in first.stdout
    assert first.stdout.endswith("bootstrap: ready. next: /root/trainway-venv/bin/trainway doctor\n")
    for name in ("git", "tmux", "vim", "ssh", "rsync", "python3"):
        assert (root / "usr" / "bin" / name).exists(), name
    assert (root / DIRECTORY[1:] / "file").read_text() == "one"
    before = files(root)

    again = run(root, *words, "--data", "/root/bootstrap.sh")
    assert again.returncode == 0, again.stderr
    assert "everything was there: nothing was changed" in again.stdout
    assert files(root) == before

    missing = run(root, *words, "--data", "/root/bootstrap.sh", "--data", "/root/data set.jsonl")
    assert missing.returncode == 3
    assert missing.stderr.startswith("error: missing: /root/data set.jsonl\n")
    assert files(root) == before
    assert not list((root / "root").rglob("x"))


def files(root: Path) -> dict[str, bytes]:
    """The content of everything in the home directory but Git's own notes of when it has asked."""
    found = {}
    for path in sorted((root / "root").rglob("*")):
        if path.is_file() and not path.is_symlink() and ".git" not in path.parts:
            found[str(path)] = hashlib.sha256(path.read_bytes()).digest()
    return found


def make_repository(path: Path) -> None:
    work = path.with_name("work")
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", "-b", "main", work], check=True)
    (work / "file").write_text("one")
    subprocess.run(["git", "-C", work, "add", "."], check=True)
    subprocess.run(["git", *names, "-C", work, "commit", "-q", "-m", "one"], check=True)
    subprocess.run(["git", "clone", "-q", "--bare", work, path], check=True)
    shutil.rmtree(work)


def write_wheel(path: Path) -> None:
    """A wheel called trainway that needs nothing: what is tested is the way, not the size of PyTorch."""
    content = {
        "trainway_stub.py": "def main():\n    print('trainway 0.0')\n",
        "trainway-0.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: trainway\nVersion: 0.0\n",
        "trainway-0.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "trainway-0.0.dist-info/entry_points.txt": "[console_scripts]\ntrainway = trainway_stub:main\n",
    }
    record = ""
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in content.items():
            wheel.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(text)}\n"
        wheel.writestr("trainway-0.0.dist-info/RECORD", f"{record}trainway-0.0.dist-info/RECORD,,\n")
