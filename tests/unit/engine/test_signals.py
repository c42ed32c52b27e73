"""Signals of a run outside of the command line."""

import signal
import time

import pytest

from sheeprlhf.engine.run import noted_signals


def test_a_second_interrupt_outside_of_the_command_line_raises_and_keeps_the_process() -> None:
    with noted_signals(is_rank_zero=True) as flags:
        signal.raise_signal(signal.SIGINT)
        assert flags.stop_pending() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)  # a thread watches the signals too
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
