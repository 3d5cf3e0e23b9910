"""The first thing a pod runs, before Trainway is on it: SSH, then Trainway, then the supervisor in its own place.

It travels as text in a variable (see `request.py`) and so imports nothing but the standard library. A container starts
again when it ends, and bills on; so whatever goes wrong here ends the pod, as the orders say.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

START = "/start.sh"
HOST_KEY = "/etc/ssh/ssh_host_ed25519_key.pub"
KEY_MARK = "[BOOT] host key: "
WAIT_KEY_S = 120


def main() -> None:
    orders = json.loads(os.environ["TRAINWAY_ORDERS"])
    try:
        start_sshd()
        say_host_key()
        install(os.environ.get("TRAINWAY_SOURCE", ""), orders)
        os.execv(sys.executable, [sys.executable, "-m", "trainway.pod"])
    except Exception as error:
        say("[BOOT] failed: " + type(error).__name__ + ": " + str(error))
        end(orders)


def say(line: str) -> None:
    print(line, flush=True)


def start_sshd() -> None:
    """By the image's own way where it has one: RunPod's images are told what to run, and then do not run it."""
    if os.access(START, os.X_OK):
        subprocess.Popen([START], stdin=subprocess.DEVNULL, start_new_session=True)
        return
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", ""))
    if sshd is None:
        raise RuntimeError("the image has neither " + START + " nor sshd")
    home = os.path.expanduser("~/.ssh")
    os.makedirs(home, mode=0o700, exist_ok=True)
    descriptor = os.open(home + "/authorized_keys", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(os.environ.get("PUBLIC_KEY", "").strip() + "\n")
    os.makedirs("/run/sshd", exist_ok=True)
    subprocess.run(["ssh-keygen", "-A"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sshd], check=True)


def say_host_key() -> None:
    """What the other side may trust: the log comes by https from the provider, the key from the network."""
    for _ in range(WAIT_KEY_S):
        if os.path.exists(HOST_KEY) and os.path.getsize(HOST_KEY):
            break
        time.sleep(1)
    else:
        raise RuntimeError("no host key at " + HOST_KEY)
    with open(HOST_KEY) as file:
        say(KEY_MARK + " ".join(file.read().split()[:2]))


def install(source: str, orders: dict[str, Any]) -> None:
    """`source`: what pip is to install, or `upload` for what the other side brings; empty when the image has it."""
    if importlib.util.find_spec("trainway") is not None:
        say("[BOOT] Trainway is on the image")
        return
    folder = os.path.join(orders["root"], "jobs", orders["job"], "source")
    if source == "upload":
        wait_for(os.path.join(folder, "READY"), orders["limits"].get("upload_minutes", 120) * 60)
        with open(os.path.join(folder, "READY")) as file:
            source = os.path.join(folder, os.path.basename(file.read().strip()))
    if not source:
        raise RuntimeError("the image has no Trainway, and nothing says where it comes from")
    say("[BOOT] installing " + source)
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--", source]
    environ = dict(os.environ, PIP_BREAK_SYSTEM_PACKAGES="1", PIP_ROOT_USER_ACTION="ignore")
    for name in ("TRAINWAY_BOOTSTRAP", "TRAINWAY_ORDERS", "RUNPOD_API_KEY"):
        environ.pop(name, None)
    subprocess.run(command, check=True, env=environ, stdin=subprocess.DEVNULL)
    importlib.invalidate_caches()


def wait_for(path: str, seconds: float) -> None:
    say("[BOOT] waiting for " + path)
    end_at = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > end_at:
            raise RuntimeError("it has not come within " + str(round(seconds / 60)) + " minutes")
        time.sleep(2)


def end(orders: dict[str, Any]) -> None:
    """End the pod as the orders say, however often that takes; then sleep, since leaving would start it again."""
    action = {"terminate": "terminate", "stop": "stop"}.get(orders.get("machine", "terminate"))
    wait = 5
    while action is not None:
        say("[END] asking RunPod to " + action + " this pod")
        try:
            ask("POST", "/pods/" + os.environ["RUNPOD_POD_ID"] + "/action", {"action": action})
        except urllib.error.HTTPError as error:
            if error.code == 404:
                break
            say("[END] " + str(error.code))
            if error.code == 409:
                end_cluster()
        except Exception as error:
            say("[END] " + type(error).__name__)
        time.sleep(wait)
        wait = min(wait * 2, 300)
    while True:
        time.sleep(3600)


def end_cluster() -> None:
    """The pod of a cluster is no machine of its own: it ends with the cluster."""
    try:
        pod = ask("GET", "/pods/" + os.environ["RUNPOD_POD_ID"])
        ask("DELETE", "/clusters/" + pod["cluster"]["id"])
    except Exception as error:
        say("[END] " + type(error).__name__)


def ask(method: str, path: str, body: Any = None) -> Any:
    # a request's headers are in no process list and in no message
    request = urllib.request.Request(
        os.environ.get("TRAINWAY_RUNPOD_API", "https://api.runpod.io/v2").rstrip("/") + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": "Bearer " + os.environ["RUNPOD_API_KEY"],
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read() or b"null")


if __name__ == "__main__":
    main()
