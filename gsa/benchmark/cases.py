"""What the GPU benchmark measures: models' shapes, a table of sizes, one-token steps."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape; letters as in the README. A group is what a user selects it by, or its name."""

    group: str
    name: str
    H: int
    G: int
    K: int
    V: int
    M: int
    B: int
    T: int

    @property
    def tuning_key(self) -> tuple[int, int, int, int]:
        """Shapes that share it need no new kernels from a library that tunes by shape."""
        return self.H, self.K, self.V, self.M

    def sizes(self) -> dict[str, int]:
        return {letter: getattr(self, letter) for letter in "HGKVMBT"}


def sequences(
    group: str, rows: tuple[tuple[int, int], ...], *, H: int, G: int, D: int
) -> tuple[Case, ...]:
    """A model's heads (K = V = D, 64 slots) at several (B, T)."""
    return tuple(
        Case(group=group, name=f"{group} {B}x{T}", H=H, G=G, K=D, V=D, M=64, B=B, T=T)
        for B, T in rows
    )


def table(slots: tuple[int, ...], widths: tuple[int, ...]) -> tuple[Case, ...]:
    """16,384 tokens of heads that are 2048 wide in all."""
    sizes = [(M, D, 2048 // D) for M in slots for D in widths]
    return tuple(
        Case(group="table", name=f"M={M} K=V={D}", H=H, G=H, K=D, V=D, M=M, B=8, T=2048)
        for M, D, H in sizes
    )


ATTENTION_CASES: tuple[Case, ...] = (
    *sequences(
        "1.3B",
        ((8, 2048), (4, 4096), (2, 8192), (1, 16384), (1, 131072)),
        H=4,
        G=4,
        D=512,
    ),
    *sequences("Mistral-7B", ((8, 2048), (1, 16384)), H=32, G=8, D=128),
    *table((32, 64, 128), (64, 128, 256)),
)

STEP_CASES: tuple[Case, ...] = tuple(
    Case(group="step", name=f"step B={B}", H=4, G=4, K=512, V=512, M=64, B=B, T=1) for B in (1, 64)
)

COLD_START_CASE = Case(
    group="cold-start", name="cold-start", H=4, G=4, K=512, V=512, M=64, B=8, T=2048
)

# In the order of measurement: what is quick comes first, in case the time runs out.
ALL_CASES = (COLD_START_CASE, *STEP_CASES, *ATTENTION_CASES)


def select(names: tuple[str, ...], cases: tuple[Case, ...] = ALL_CASES) -> list[Case]:
    """The cases of these groups or names, in the order of `cases`; all of them for no names.

    Raises:
        ValueError: a name is neither.
    """
    for name in names:
        if not any(name in (case.group, case.name) for case in cases):
            groups = ", ".join(dict.fromkeys(case.group for case in cases))
            single = "; ".join(case.name for case in cases)
            raise ValueError(f"cases: expected groups ({groups}) or names ({single}), got {name!r}")
    return [case for case in cases if not names or {case.group, case.name} & set(names)]
