"""`deepdelta doctor`: the self-check passes here, and finds a backend that is wrong."""

from typing import Any

import pytest
import torch

from deepdelta import selfcheck
from deepdelta.cli import main
from deepdelta.selfcheck import self_check


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str], unchecked: None) -> None:
    main(["doctor"])
    printed = capsys.readouterr().out
    assert f"torch      {torch.__version__}" in printed
    assert "at V = 4, d 768, auto: fused" in printed
    assert "a sharded or hooked layer opens its own state" in printed
    assert "fused" in printed and "ok" in printed and "WRONG" not in printed


def test_every_precision_is_tried_and_the_absent_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {(check.backend, check.device, check.dtype): check for check in self_check()}
    for dtype, error in (("fp32", 1e-5), ("fp16", 1e-2), ("bf16", 1e-1)):
        fused = found["fused", "cpu", dtype]
        assert fused.verdict == "ok" and fused.value_error is not None and 0 < fused.value_error < error
    monkeypatch.setattr(selfcheck, "fused_problem", lambda device, dtype: "numba is absent")
    assert {check.verdict for check in self_check() if check.backend == "fused"} == {"numba is absent"}


@pytest.mark.parametrize("fault", ["value", "gradient"])
def test_a_wrong_backend_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unchecked: None
) -> None:
    def wrong(*given: Any) -> Any:
        state, c = selfcheck._reference(*given)
        if fault == "value":
            return state + 0.01 * given[0].detach().abs().max(), c
        # The same values, but half of the gradient of h is lost.
        h = given[1]
        return selfcheck._reference(given[0], (h + h.detach()) / 2, *given[2:])

    monkeypatch.setattr(selfcheck, "_fused", wrong)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 2
    assert "computes wrong numbers here" in capsys.readouterr().err
