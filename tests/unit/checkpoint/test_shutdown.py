"""Signals become a flag, a second one is safe, the old handlers come back."""

import os
import signal
import threading
import time

import pytest

from trainway.training.shutdown import StopSignal


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested and stop.name is None and stop.time is None
        send(number)
        assert stop.requested and stop.name == number.name
        assert stop.time == pytest.approx(time.time(), abs=10)
    assert signal.getsignal(number) is before


def test_further_signals_are_counted_and_hinted_once(capfd):
    with StopSignal() as stop:
        send(signal.SIGINT)
        for _ in range(5):
            send(signal.SIGTERM)
        send(signal.SIGINT)
        assert (stop.name, stop.count) == ("SIGINT", 7)
    assert capfd.readouterr().err.count("already stopping") == 1


def test_the_third_interrupt_is_the_way_out():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignal():
        for _ in range(3):
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_request_keeps_the_first_reason():
    with StopSignal() as stop:
        stop.request("time limit")
        stop.request("other")
        send(signal.SIGTERM)
        assert stop.requested and stop.name == "time limit"


def test_harmless_off_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopSignal() as stop:
            stop.request("x")
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(True, True)]
