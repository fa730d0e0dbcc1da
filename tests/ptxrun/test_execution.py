"""How warps run: divergence, barriers, schedules, races, cp.async, and what is counted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ptxrun import BarrierError, MemoryFault, launch
from tests.ptxrun.snippets import ptx_kernel, run_ptx

SCHEDULES = pytest.mark.parametrize("schedule", ["lockstep", "random"])


@SCHEDULES
def test_divergence(schedule: str) -> None:
    """Each lane loops tid % 7 times, an out-of-line block sits behind the exit, and lanes leave early."""
    out = np.full(64, 99, np.uint32)
    run_ptx(
        """
        rem.u32 %r2, %r1, 7; mov.b32 %r3, 0; setp.eq.u32 %p1, %r2, 0;
        setp.gt.u32 %p5, %r1, 60;
        @%p5 ret;
        @%p1 bra AWAY;
    LOOP:
        add.u32 %r3, %r3, 10; sub.u32 %r2, %r2, 1; setp.ne.u32 %p2, %r2, 0;
        @%p2 bra LOOP;
    JOIN:
        setp.lt.u32 %p4, %r1, 61;
        vote.sync.ballot.b32 %r4, %p4, -1;       // only complete if everybody has come back
        setp.lt.u32 %p3, %r1, 32; selp.b32 %r5, -1, 0x1fffffff, %p3; setp.eq.b32 %p6, %r4, %r5;
        selp.b32 %r6, 1, 0, %p6; add.u32 %r3, %r3, %r6; st.global.b32 [%rd10], %r3;
        ret;
    AWAY:
        mov.b32 %r3, 500;
        bra.uni JOIN;""",
        out,
        warps=2,
        schedule=schedule,
    )
    assert out.tolist() == [(10 * (i % 7) or 500) + 1 if i <= 60 else 99 for i in range(64)]


@SCHEDULES
def test_divergence_at_a_warp_wide_instruction(schedule: str) -> None:
    with pytest.raises(BarrierError, match="diverged"):
        run_ptx(
            """setp.lt.u32 %p1, %r1, 8; @%p1 bra A; ret;
                A: shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1; bra.uni B;
                B: bar.sync 0; ret;""".replace(
                "ret;\n                A", "add.u32 %r5, %r1, 1; bra.uni B;\n A"
            ),
            np.zeros(64, np.uint32),
            warps=2,
            schedule=schedule,
        )
    with pytest.raises(BarrierError, match="diverged"):
        run_ptx(
            """setp.lt.u32 %p1, %r1, 8; @%p1 bra A; bra.uni B;
                A: bar.sync 0;
                B: ret;""",
            np.zeros(64, np.uint32),
            warps=2,
            schedule=schedule,
        )


@SCHEDULES
def test_barriers_between_warps(schedule: str) -> None:
    """Warps 0 and 1 exchange values through barrier 1 (64 threads); warps 2 and 3 do not take part."""
    body = """
        shl.b32 %r2, %r1, 2; mov.b32 %r3, global_smem; add.u32 %r4, %r3, %r2;
        setp.ge.u32 %p1, %r1, 64;
        @%p1 bra OUT;
        st.shared.b32 [%r4], %r1;
        bar.sync 1, 64;
        xor.b32 %r5, %r2, 128; add.u32 %r5, %r3, %r5; ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd10], %r6;
        bra.uni END;
    OUT:
        st.global.b32 [%rd10], %r1;
    END:
        bar.sync 0;
        ret;"""
    for seed in range(4):
        out = np.zeros(128, np.uint32)
        run_ptx(body, out, warps=4, schedule=schedule, seed=seed)
        assert out.tolist() == [i ^ 32 if i < 64 else i for i in range(128)]
    with pytest.raises(BarrierError, match="stuck"):
        run_ptx(
            body.replace("bar.sync 1, 64", "bar.sync 1, 96"),
            np.zeros(128, np.uint32),
            warps=4,
            schedule=schedule,
        )


def test_early_exit_does_not_block_a_barrier() -> None:
    for seed in range(8):
        out = np.zeros(128, np.uint32)
        run_ptx(
            """setp.ge.u32 %p1, %r1, 96; @%p1 ret; bar.sync 0; st.global.b32 [%rd10], %r1; ret;""",
            out,
            warps=4,
            schedule="random",
            seed=seed,
        )
        assert out.tolist() == [i if i < 96 else 0 for i in range(128)]


def test_random_schedule_interleaves() -> None:
    """Two tickets per warp, drawn in one basic block: warps come in any order and between each other's draws."""
    orders, apart = set(), 0
    for seed in range(12):
        out = np.zeros(260, np.uint32)
        run_ptx(
            """and.b32 %r2, %r1, 31; setp.eq.u32 %p1, %r2, 0; add.u32 %r3, %r1, 1; add.u32 %r4, %r1, 2;
            @%p1 atom.global.add.u32 %r5, [%rd1+1024], 1; xor.b32 %r3, %r3, %r4; xor.b32 %r3, %r3, %r4;
            @%p1 atom.global.add.u32 %r6, [%rd1+1024], 1;
            @%p1 st.global.b32 [%rd10], %r5; @%p1 st.global.b32 [%rd10+4], %r6; ret;""",
            out,
            warps=8,
            schedule="random",
            seed=seed,
        )
        first, second = out[0:256:32], out[1:256:32]
        assert sorted([*first, *second]) == list(range(16))
        orders.add(tuple(first))
        apart += (second != first + 1).any()
    assert len(orders) > 8 and apart >= 3


def test_readers_are_remembered() -> None:
    together = "ld.global.b32 %r2, [%rd1];"
    in_turn = "@!%p1 ld.global.b32 %r2, [%rd1]; @%p1 ld.global.b32 %r2, [%rd1];"
    for loads in (together, in_turn):
        for store, racy in (
            ("@%p1 st.global.b32 [%rd1], %r1;", True),
            ("@!%p1 st.global.b32 [%rd1], %r1;", True),
            ("bar.sync 0; @%p1 st.global.b32 [%rd1], 5;", False),
        ):
            st = run_ptx(f"setp.ge.u32 %p1, %r1, 32; {loads} {store} ret;", np.zeros(4, np.uint32), warps=2)
            assert ("read-write" in {r.kind for r in st.races}) == racy
    # CTA 0 reads; CTA 1 reads with two warps, passes a barrier and writes
    st = launch(
        ptx_kernel("""mov.u32 %r3, %ctaid.x; setp.eq.u32 %p2, %r3, 1; setp.eq.u32 %p3, %r1, 0;
        ld.global.b32 %r2, [%rd1]; bar.sync 0; and.pred %p2, %p2, %p3; @%p2 st.global.b32 [%rd1], 9; ret;"""),
        (2, 1, 1),
        [np.zeros(4, np.uint32)],
        2,
        16,
    )
    assert [(r.kind, r.ctas) for r in st.cta_races] == [("read-write", (0, 1))] and st.races == []


def test_grid_order() -> None:
    out = np.zeros(12, np.uint32)
    launch(
        ptx_kernel("""mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.z; mov.u32 %r5, %nctaid.x;
        mov.u32 %r6, %nctaid.y; mad.lo.u32 %r7, %r4, %r6, %r3; mad.lo.u32 %r7, %r7, %r5, %r2;
        mad.wide.u32 %rd5, %r7, 4, %rd1; mad.lo.u32 %r8, %r3, 10, %r2; mad.lo.u32 %r8, %r4, 100, %r8;
        st.global.b32 [%rd5], %r8; ret;"""),
        (3, 2, 2),
        [out],
        1,
        16,
    )
    assert out.tolist() == [x + 10 * y + 100 * z for z in range(2) for y in range(2) for x in range(3)]


CP_ASYNC = """
    shl.b32 %r2, %r1, 4; mov.b32 %r3, global_smem; add.u32 %r4, %r3, %r2;
    mad.wide.u32 %rd11, %r1, 16, %rd1; mad.wide.u32 %rd12, %r1, 16, %rd2;
    mov.b32 %r20, 7; st.shared.v4.b32 [%r4], {%r20, %r20, %r20, %r20};
    COPY
    cp.async.commit_group;
    WAIT
    ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r4]; st.global.v4.b32 [%rd12], {%r5, %r6, %r7, %r8}; ret;"""


@SCHEDULES
@pytest.mark.parametrize(
    "copy,keep",
    [
        ("cp.async.cg.shared.global [%r4], [%rd11], 16;", lambda i: 16),
        ("rem.u32 %r9, %r1, 17; cp.async.cg.shared.global [%r4], [%rd11], 0x10, %r9;", lambda i: i % 17),
        (
            "setp.lt.u32 %p1, %r1, 9; cp.async.cg.shared.global [%r4], [%rd11], 16, %p1;",
            lambda i: 0 if i < 9 else 16,
        ),
        (
            "setp.lt.u32 %p1, %r1, 9; @%p1 cp.async.cg.shared.global [%r4], [%rd11], 16;",
            lambda i: 16 if i < 9 else -1,
        ),
    ],
)
def test_cp_async(copy: str, keep: Callable[[int], int], schedule: str) -> None:
    x = np.random.default_rng(0).integers(0, 256, (32, 16), dtype=np.uint8)
    want = np.full((32, 16), 0, np.uint8)
    for i in range(32):
        want[i, : max(keep(i), 0)] = x[i, : max(keep(i), 0)]
        if keep(i) < 0:
            want[i] = [7, 0, 0, 0] * 4
    out = np.zeros((32, 16), np.uint8)
    text = CP_ASYNC.replace("COPY", copy)
    # nothing is read past the source size: the array ends where lane 31's bytes end
    last = max(keep(31), 0)
    src = x.reshape(-1)[: 31 * 16 + last].copy() if keep(31) < 16 else x
    st = run_ptx(text.replace("WAIT", "cp.async.wait_group 0;"), src, out, schedule=schedule)
    assert (
        (out == want).all()
        and st.races == []
        and st.cp_async_bytes == sum(max(keep(i), 0) for i in range(32))
    )
    st = run_ptx(text.replace("WAIT", "cp.async.wait_group 1;"), src, out, schedule=schedule)
    assert (out.view(np.uint32) == 7).all() and {r.kind for r in st.races} == {"cp.async-read"}


def test_shared_memory_checks() -> None:
    out = np.zeros(32, np.uint32)
    head = "shl.b32 %r2, %r1, 2; mov.b32 %r3, global_smem; add.u32 %r4, %r3, %r2;"
    st = run_ptx(head + "ld.shared.b32 %r5, [%r4+64]; st.global.b32 [%rd10], %r5; ret;", out)
    assert st.uninit_reads == 32 and "ld.shared" in next(iter(st.uninit)) and np.isnan(out.view("f4")).all()
    st = run_ptx(
        head + "ld.shared.b32 %r5, [%r4+64]; st.global.b32 [%rd10], %r5; ret;", out, check_uninit=False
    )
    assert st.uninit_reads == 0
    with pytest.raises(MemoryFault, match="'shared'"):
        run_ptx(head + "st.shared.b32 [%r4+1000], %r1; ret;", out)
    # lanes of one store that disagree about a word are a race; writing the same value is not
    st = run_ptx(head + "st.shared.b32 [global_smem], %r1; ret;", out)
    assert st.races[0].kind == "write-write"
    assert run_ptx(head + "st.shared.b32 [global_smem], 5; ret;", out).races == []


@pytest.mark.parametrize("stride,extra", [(1, 0), (2, 1), (32, 31), (33, 0)])
def test_bank_conflicts(stride: int, extra: int) -> None:
    st = run_ptx(
        f"""mul.lo.u32 %r2, %r1, {4 * stride}; mov.b32 %r3, global_smem; add.u32 %r4, %r3, %r2;
        st.shared.b32 [%r4], %r1; ret;""",
        np.zeros(32, np.uint32),
        shared=8192,
    )
    assert st.shared_conflicts == extra


def test_counts() -> None:
    out = np.zeros(64, np.uint32)
    ptx = ptx_kernel("""mov.b32 %r2, 0;
        L: add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 10; @%p1 bra L;
        bar.sync 0; st.global.b32 [%rd10], %r2; ret;""")
    st = launch(ptx, (3, 2, 1), [out], 2, 16)
    assert (out == 10).all() and len(st.per_cta) == 6
    per_warp = 3 + 1 + 30 + 3  # head, mov, loop, tail
    assert st.instructions == 6 * 2 * per_warp and st.ops["add.u32"] == 120
    assert st.barriers == 6 and st.per_cta[5]["instructions"] == 2 * per_warp
    assert st.global_store_bytes == 6 * 256 and st.unique["arg0"] == (0, 256)
    assert st.cta_races == []  # all six programs store, but the same values


# copy, one access to the source by the lanes where %p1, before or after the wait, and whether that races
SOURCE_ACCESS = {
    ("@%p1 st.global.b32 [%rd11], %r1;", "before", "early"): {"cp.async source-write"},
    ("@%p1 st.global.b32 [%rd11], %r1;", "before", "late"): {"cp.async source-write"},
    ("@%p1 st.global.b32 [%rd11], %r1;", "after", "early"): set(),
    ("@%p1 st.global.b32 [%rd13], %r1;", "after", "late"): {"read-write"},
    ("@%p1 ld.global.b32 %r6, [%rd11];", "before", "early"): set(),
    ("bar.sync 0; st.global.b32 [%rd13], %r1;", "after", "late"): set(),
}


@SCHEDULES
@pytest.mark.parametrize(("access", "when", "warp"), SOURCE_ACCESS)
def test_source_of_a_copy_under_way(access: str, when: str, warp: str, schedule: str) -> None:
    """%rd11 is what the lane itself copies, %rd13 what the same lane of the other warp copies."""
    x, y = np.ones((64, 4), np.uint32), np.zeros(64, np.uint32)
    before, after = (access, "") if when == "before" else ("", access)
    st = run_ptx(
        f"""shl.b32 %r2, %r1, 4; mov.b32 %r3, global_smem; add.u32 %r4, %r3, %r2;
        mad.wide.u32 %rd11, %r1, 16, %rd1; mad.wide.u32 %rd12, %r1, 4, %rd2;
        xor.b32 %r5, %r1, 32; mad.wide.u32 %rd13, %r5, 16, %rd1;
        setp.{"lt" if warp == "early" else "ge"}.u32 %p1, %r1, 32;
        cp.async.cg.shared.global [%r4], [%rd11], 16; cp.async.commit_group;
        {before}
        cp.async.wait_group 0;
        {after}
        ld.shared.b32 %r6, [%r4]; st.global.b32 [%rd12], %r6; ret;""",
        x,
        y,
        warps=2,
        schedule=schedule,
        shared=1024,
    )
    kinds = {race.kind for race in st.races}
    want = SOURCE_ACCESS[access, when, warp]
    # in the random schedule the other warp may store before this one waits, which is as wrong
    assert kinds == want or (schedule == "random" and want and kinds)
    assert (y == 1).all() or want


@pytest.mark.parametrize(("order", "racy"), [("acq_rel", False), ("relaxed", True)])
def test_a_warp_publishes_its_own_writes(order: str, racy: bool) -> None:
    """CTA 0 writes and releases, CTA 1 acquires and reads; one warp each, so no barrier is needed."""
    st = launch(
        ptx_kernel(f"""mov.u32 %r3, %ctaid.x; setp.eq.u32 %p1, %r3, 0; setp.eq.u32 %p2, %r1, 0;
        @%p1 st.global.b32 [%rd10], %r1;
        @%p2 atom.{order}.gpu.global.add.u32 %r4, [%rd1+128], 1;
        @!%p1 ld.global.b32 %r5, [%rd10]; ret;"""),
        (2,),
        [np.zeros(33, np.uint32)],
        1,
        16,
    )
    assert bool(st.cta_races) == racy and st.races == []


@SCHEDULES
@pytest.mark.parametrize(("barrier", "racy"), [("", {1}), ("bar.sync 0;", set())])
def test_what_one_warp_acquires_the_others_have_after_a_barrier(
    barrier: str, racy: set[int], schedule: str
) -> None:
    """CTA 0 writes and releases; in CTA 1 warp 0 waits for it, and both warps read."""
    st = launch(
        ptx_kernel(f"""mov.u32 %r3, %ctaid.x; setp.eq.u32 %p1, %r3, 0; setp.ge.u32 %p2, %r1, 32;
        setp.eq.u32 %p3, %r1, 0; and.pred %p3, %p3, %p1;
        @%p1 st.global.b32 [%rd10], %r1; bar.sync 0;
        @%p3 red.release.gpu.global.add.u32 [%rd1+256], 1;
        @%p1 bra END; @%p2 bra READ;
        WAIT: ld.acquire.gpu.global.u32 %r4, [%rd1+256]; setp.eq.u32 %p4, %r4, 0; @%p4 bra WAIT;
        READ: {barrier} ld.global.b32 %r5, [%rd10];
        END: ret;"""),
        (2,),
        [np.zeros(65, np.uint32)],
        2,
        16,
        schedule=schedule,
        resident=2,
    )
    assert {race.warps[1] for race in st.cta_races} == racy and st.races == []


@SCHEDULES
def test_copies_are_committed_and_awaited_by_lane(schedule: str) -> None:
    """Half a warp commits: only its copies land at the wait, and what it stores then stays."""
    x, out = np.arange(100, 132, dtype=np.uint32), np.zeros((3, 32), np.uint32)
    st = run_ptx(
        """shl.b32 %r2, %r1, 2; mov.b32 %r3, global_smem; add.u32 %r4, %r3, %r2; setp.lt.u32 %p1, %r1, 16;
        mad.wide.u32 %rd11, %r1, 4, %rd2; st.shared.b32 [%r4], 7;
        cp.async.ca.shared.global [%r4], [%rd10], 4;
        @%p1 cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd11], %r5;
        @%p1 st.shared.b32 [%r4], 9; cp.async.wait_all;
        ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd11+128], %r5; ret;""",
        x,
        out,
        schedule=schedule,
    )
    assert out[0].tolist() == [*range(100, 116), *[7] * 16]
    assert out[1].tolist() == [*[9] * 16, *range(116, 132)]
    assert {(race.kind, race.count) for race in st.races} == {("cp.async-read", 16)}


@SCHEDULES
def test_copy_of_what_another_warp_changes(schedule: str) -> None:
    """Warp 1 copies what warp 0 writes, plainly or atomically, with or without a barrier between."""
    for write in ("st.global.b32 [%rd1], 7;", "red.relaxed.gpu.global.add.u32 [%rd1], 0;"):
        for barrier, racy in (("", True), ("bar.sync 0;", False)):
            st = run_ptx(
                f"""setp.lt.u32 %p1, %r1, 32; mov.b32 %r4, global_smem; @%p1 {write}
                {barrier}
                @!%p1 cp.async.ca.shared.global [%r4], [%rd1], 4; cp.async.wait_all; ret;""",
                np.zeros(4, np.uint32),
                warps=2,
                schedule=schedule,
            )
            assert bool(st.races) == racy, (write, barrier)


def test_a_copy_left_behind_does_not_outlive_its_cta() -> None:
    """CTA 0 never waits for its copy; CTA 1 may write the source."""
    st = launch(
        ptx_kernel("""mov.u32 %r3, %ctaid.x; setp.eq.u32 %p1, %r3, 0; mov.b32 %r4, global_smem;
        @%p1 cp.async.ca.shared.global [%r4], [%rd1], 4; @!%p1 st.global.b32 [%rd1+4], 5; ret;"""),
        (2,),
        [np.zeros(4, np.uint32)],
        1,
        16,
    )
    assert st.races == st.cta_races == [] and st.total["cp.async never waited for"] == 32


def test_arguments_share_an_address_range_only_if_they_overlap() -> None:
    x = np.zeros(64, np.uint32)
    body = "st.global.b32 [%rd10], %r1; ret;"
    assert run_ptx(body, x[:32], x[16:], x[40:40]).unique.keys() == {"arg0|arg1"}
    assert run_ptx(body, x[:32], x[8:8], x[32:]).unique.keys() == {"arg0"}


def test_scalar_arguments_have_the_type_of_the_parameter() -> None:
    text = ptx_kernel("st.global.b32 [%rd10], %r1; ret;", params=2).replace(
        ".param .u64 .ptr .global .align 1 k_param_1", ".param .u64 k_param_1"
    )
    launch(text, (1,), [np.zeros(32, np.uint32), 3], 1, 16)
    with pytest.raises(TypeError):
        launch(text, (1,), [np.zeros(32, np.uint32), 3.5], 1, 16)
