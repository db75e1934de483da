"""The watchdog of one process: what it lets pass, what it ends, and what it leaves in the log."""

import re
import subprocess
import sys
import textwrap

import pytest

SETUP = """
    import ctypes, multiprocessing, os, signal, threading, time
    from mede2.trainer import watchdog

    watchdog.POLL_S, watchdog.GRACE_S, watchdog.TERM_S, watchdog.MARGIN_S = 0.05, 0.2, 1.0, 0.5
    signal.signal(signal.SIGTERM, lambda *_: None)

    def later(seconds, number=signal.SIGTERM):
        threading.Timer(seconds, os.kill, (os.getpid(), number)).start()

    def lost_in_thought(seconds=30):
        time.sleep(seconds)

    def work(seconds):
        for turn in range(round(20 * seconds)):
            watchdog.beat(f"update {{turn + 1}}")
            time.sleep(0.05)

    watchdog.start(3, hang_minutes={hang_s} / 60)
"""


@pytest.fixture
def watched():
    """`watched(code, hang_s=30)` runs it with a watchdog that allows so much; returns the exit code and the log."""

    def run(code: str, hang_s: float = 30) -> tuple[int, str]:
        code = textwrap.dedent(SETUP.format(hang_s=hang_s)) + textwrap.dedent(code)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    return run


def test_silence_ends_the_process_with_its_stacks(watched):
    code, log = watched("work(0.2); watchdog.beat('update 7'); lost_in_thought()", 1)
    assert code == 1
    headline, *stacks = log.splitlines()
    assert headline.startswith("[rank 3] watchdog: rank 3 on ")
    assert re.search(r" has given no sign of life for \d+ s, since it began: update 7; it ends$", headline)
    assert all(line.startswith("[rank 3] ") for line in stacks)
    main_thread = stacks.index("[rank 3] Main thread (most recent call first):")
    assert stacks[main_thread + 1].endswith("in lost_in_thought")


def test_signs_of_life_and_phases_keep_it_alive(watched):
    code = "work(4); watchdog.phase('exporting'); lost_in_thought(4); work(0.2); watchdog.stop()"
    assert watched(code, 3) == (0, "")


def test_a_phase_has_an_allowance_too(watched):
    code, log = watched("""
        watchdog.stop()
        watchdog.PHASE_MINUTES = 2 / 60
        watchdog.start(3, hang_minutes=1 / 60)
        watchdog.phase('exporting')
        lost_in_thought()
    """)
    assert code == 1
    assert re.search(r"no sign of life for \d+ s, since it began: exporting; it ends", log)


def test_a_thread_that_keeps_the_interpreter_to_itself_is_seen(watched):
    """No Python thread runs then, the watchdog's neither."""
    code, log = watched("work(0.5); ctypes.PyDLL(None).sleep(30)", 2)
    assert code == 1
    assert "Timeout" in log
    assert '"<string>"' in log


def test_sigterm_while_stuck_ends_it(watched):
    """As a launcher sends it when another rank has died, which this one would wait for."""
    code, log = watched("""
        work(0.5)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # or it would end the sleep, unlike a collective
        later(0.3)
        ctypes.CDLL(None).sleep(30)
    """)
    assert code == 1
    assert "got SIGTERM and has been busy for" in log
    assert "with: update 10" in log
    assert "is stuck in: update 10; it ends" in log
    assert '"<string>"' in log


def test_sigterm_in_a_phase_only_tells_where(watched):
    """It may be a polite request, and the phase the checkpoint that answers it."""
    code, log = watched("work(0.5); watchdog.phase('saving'); later(0.1); lost_in_thought(3); watchdog.stop()")
    assert code == 0
    assert log.count("with: saving") == 1
    assert "in lost_in_thought" in log


def test_sigterm_in_a_slow_but_usual_step_only_tells_where(watched):
    code, log = watched("""
        watchdog.beat('update 1'); time.sleep(1.5); watchdog.beat('update 2'); later(0.0); time.sleep(1.5)
        work(1); watchdog.stop()
    """)
    assert code == 0
    assert log.count("with: update 2") == 1


def test_sigterm_to_one_that_works_on_says_nothing(watched):
    assert watched("later(0.3); work(2); watchdog.stop()") == (0, "")


def test_signals_to_a_forked_child_are_none_of_its_parent(watched):
    code, log = watched("""
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(2,))
        work(0.3); child.start(); later(10, 0); time.sleep(0.3); os.kill(child.pid, signal.SIGTERM); time.sleep(0.1)
        watchdog.phase('waiting'); child.join(); watchdog.stop(); os._exit(0)
    """)
    assert (code, log) == (0, "")


def test_without_a_watchdog_signs_of_life_cost_nothing_and_do_nothing(watched):
    assert watched("watchdog.stop(); work(0.2); watchdog.phase('exporting'); time.sleep(1.5)", 1) == (0, "")
