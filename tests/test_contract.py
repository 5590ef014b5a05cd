"""The speed contract, compared with predictions."""

from __future__ import annotations

from bench import contract
from qlinear.machines import MACHINES


def prediction(scheme: str, m: int, times: float, **more: object) -> dict[str, object]:
    row = {"machine": "H200", "scheme": scheme, "dtype": "bf16", "M": m, "N": 4096, "K": 4096, "bound": "memory"}
    return row | {"times_16_bit": times} | more


def test_the_contract_is_compared_with_the_slowest_layer() -> None:
    rows = [
        prediction("w4a16", 1, 3.0), prediction("w4a16", 1, 0.9, N=8192), prediction("w4a16", 256, 0.86),
        prediction("w4a16", 4096, 0.94), prediction("w8a8", 256, 0.99), prediction("w8a8", 1, 0.1, N=1024),
        prediction("w4a8", 1, 0.1), prediction("w4a16", 4, 0.1), prediction("w4a16", 16, 0.1, machine="A100"),
    ]  # fmt: skip
    found = contract.worst(rows, MACHINES["H200"])
    told = [(row["scheme"], row["M"], row["times_16_bit"], row["N"], row["held"]) for row in found]
    assert told == [
        ("w4a16", 1, 0.9, 8192, False),
        ("w4a16", 256, 0.86, 4096, True),
        ("w4a16", 4096, 0.94, 4096, False),
        ("w8a8", 256, 0.99, 4096, False),
    ]
    text = contract.as_table(found, MACHINES["H200"])
    assert "0.90x !" in text and "0.86x  " in text and contract.as_table([], MACHINES["H200"]) == ""
    # An A100's tensor cores do not know e4m3.
    assert contract.worst([prediction("fp8", 1, 0.5, machine="A100")], MACHINES["A100"]) == []
