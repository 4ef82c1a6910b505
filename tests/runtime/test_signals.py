"""Signals: the first two are answered and obeyed once all is saved, the third at once."""

import signal
import threading

import pytest

from rdm_jax.runtime.errors import Interrupted
from rdm_jax.runtime.signals import ANSWERS, StopOnSignal


def test_stop_on_signal_third_signal_interrupts_at_once(capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopOnSignal() as stop:
        stop.check()
        for number, answer in zip((signal.SIGTERM, signal.SIGINT), ANSWERS, strict=True):
            signal.raise_signal(number)
            assert capfd.readouterr().err == answer.decode()
        with pytest.raises(Interrupted, match="SIGTERM") as stopped:
            stop.check()
        assert stopped.value.status == 143 and not stopped.value.at_once
        with pytest.raises(Interrupted, match="SIGINT") as stopped:
            signal.raise_signal(signal.SIGINT)
        assert stopped.value.status == 130 and stopped.value.at_once
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_stop_on_signal_works_without_stderr(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    with StopOnSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.requested == signal.SIGTERM


def test_stop_on_signal_installs_nothing_in_other_threads():
    before, found = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)), []

    def work():
        with StopOnSignal() as stop:
            found.extend(
                [stop.requested, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
            )
            stop.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None, *before]
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
