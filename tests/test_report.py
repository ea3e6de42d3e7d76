"""What a person sees: lines in a pipe, a bar on a terminal, nothing when quiet; text is shown as it is."""

import io
import sys

import pytest

from jaxgpt.training.report import PlainReporter, Reporter, TerminalReporter, describe_evaluation, make_reporter


class Terminal(io.StringIO):
    def isatty(self):
        return True


def tell(report):
    """Everything a run says; return the sample."""
    report.say("a line [bold]with marks[/bold]")
    report.begin(10)
    for step in range(1, 4):
        report.step(step, 2.5, 1234.0, float(step))
    report.evaluation(3, {"eval/loss": 1.8857, "eval/bits_per_byte": 2.7})
    report.finish()
    report.finish()
    return report.stream(iter(["to ", "be"]))


def test_quiet_is_silent_but_the_sample_is_made(capsys):
    assert tell(Reporter()) == "to be"
    assert capsys.readouterr() == ("", "")


def test_a_pipe_gets_plain_lines(capsys):
    assert tell(PlainReporter()) == "to be"
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "a line [bold]with marks[/bold]"
    assert lines[1] == "step 1  loss 2.5000  1,234 tokens/s  10%"
    assert lines[2] == "step 3  held-out loss 1.8857  bits_per_byte 2.7000"  # steps 2 and 3 came too soon for a line
    assert lines[3:] == ["to be"] and not err


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert tell(TerminalReporter()) == "to be"
    shown = terminal.getvalue()
    for text in ("a line [bold]with marks[/bold]", "loss 2.5000", "1,234 tokens/s", "held-out loss 1.8857", "to be"):
        assert text in shown
    assert "━" in shown


@pytest.mark.parametrize(
    ("quiet", "stdout", "kind"),
    [(True, Terminal(), Reporter), (False, Terminal(), TerminalReporter), (False, io.StringIO(), PlainReporter)],
)
def test_the_form_fits_standard_output(monkeypatch, quiet, stdout, kind):
    monkeypatch.setattr(sys, "stdout", stdout)
    assert type(make_reporter(quiet)) is kind


def test_metrics_are_named_for_people():
    assert describe_evaluation({"eval/loss": 1.0, "eval/perplexity": 2.0}) == "held-out loss 1.0000  perplexity 2.0000"
