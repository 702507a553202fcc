"""Which instructions are compiled for, by the processor's flags and LLAMITA_KERNELS."""

from pathlib import Path

import pytest

from llamita.backend.torch.infer.kernels import choice

ZEN_3 = frozenset({"avx", "avx2", "fma", "f16c"})
ZEN_4 = ZEN_3 | {"avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16"}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """PyTorch's threads, Numba installed, and the features of a processor."""
    monkeypatch.setattr(choice, "openmp_library", lambda: Path("libgomp.so"))
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: name)

    def has(found: frozenset[str]) -> None:
        monkeypatch.setattr(choice, "features", lambda: found)

    return has


@pytest.mark.parametrize(
    ("features", "asked", "found"),
    [
        (ZEN_4, "auto", "avx512"),
        (ZEN_3, "auto", "avx2"),
        (ZEN_4 - {"avx512bf16"}, "auto", "avx2"),
        (ZEN_3, "", "avx2"),
        (frozenset(), "auto", None),
        (ZEN_3, "portable", "portable"),
        (ZEN_4, "avx2", "avx2"),
        (ZEN_4, "portable", "portable"),
        (ZEN_4, "off", None),
    ],
)
def test_the_best_that_the_processor_has_or_what_is_asked_for(machine, monkeypatch, features, asked, found) -> None:
    machine(features)
    monkeypatch.setenv(choice.VARIABLE, asked)
    assert choice.choose_kernels().instructions == found


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("sse", "LLAMITA_KERNELS=sse is not known; give off, auto or one of avx512, avx2, portable"),
        ("avx512", "LLAMITA_KERNELS=avx512: this processor has only avx2, portable"),
    ],
)
def test_what_cannot_be_had_is_refused(machine, monkeypatch, asked, message) -> None:
    machine(ZEN_3)
    monkeypatch.setenv(choice.VARIABLE, asked)
    with pytest.raises(ValueError, match=f"^{message}$"):
        choice.choose_kernels()


def test_without_numba_the_extra_is_named(machine, monkeypatch) -> None:
    machine(ZEN_4)
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    found = choice.choose_kernels()
    assert found.shown == "PyTorch's operators (kernels of our own need Numba: pip install 'llamita[fast]')"
    monkeypatch.setenv(choice.VARIABLE, "avx2")
    with pytest.raises(ValueError, match="needs Numba: pip install 'llamita"):
        choice.choose_kernels()


def test_one_thread_alone_is_not_chosen(machine, monkeypatch) -> None:
    machine(ZEN_4)
    monkeypatch.setattr(choice, "openmp_library", lambda: None)
    monkeypatch.setenv(choice.VARIABLE, "auto")
    assert choice.choose_kernels().instructions is None
    monkeypatch.setenv(choice.VARIABLE, "avx512")
    assert choice.choose_kernels().shown == "avx512 kernels (asked for)"
