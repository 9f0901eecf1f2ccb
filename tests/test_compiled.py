"""What `benchmarks.compiled` reads from a compiled program and counts, on programs whose numbers are known."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks import compiled, hlo
from benchmarks.control_flow import named, place

PROGRAM = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,1024]{1,0})->f32[1024]{0}}

FileNames
1 "step.py"

%fused_rows (param_0.1: f32[8,1024]) -> f32[1024] {
  %param_0.1 = f32[8,1024]{1,0} parameter(0)
  %slice.1 = f32[1,1024]{1,0} slice(%param_0.1), slice={[0:1], [0:1024]}
  %slice.2 = f32[1,1024]{1,0} slice(%param_0.1), slice={[3:4], [0:1024]}
  %add.1 = f32[1,1024]{1,0} add(%slice.1, %slice.2)
  ROOT %bitcast.1 = f32[1024]{0} bitcast(%add.1)
}

%body.1 (arg.1: (f32[8,8], s32[], /*index=2*/pred[])) -> (f32[8,8], s32[], pred[]) {
  %arg.1 = (f32[8,8]{1,0}, s32[], pred[]) parameter(0)
  %m.1 = f32[8,8]{1,0} get-tuple-element(%arg.1), index=0
  %potrf = (f32[8,8]{0,1}, s32[]) custom-call(%m.1), custom_call_target="cusolver_potrf_ffi"
  %rows.1 = f32[8,8]{1,0} copy(%m.1)
  ROOT %out.1 = (f32[8,8]{1,0}, s32[], pred[]) tuple(%rows.1, %arg.1)
}

%condition.1 (arg.2: (f32[8,8], s32[], pred[])) -> pred[] {
  %arg.2 = (f32[8,8]{1,0}, s32[], pred[]) parameter(0)
  ROOT %and.1 = pred[] fusion(%arg.2), kind=kLoop, calls=%fused_rows, metadata={op_name="and"}
}

%rarely (arg.3: (f32[8,8])) -> (f32[8,8]) {
  %arg.3 = (f32[8,8]{1,0}) parameter(0)
  %m.3 = f32[8,8]{1,0} get-tuple-element(%arg.3), index=0
  %start.3 = f32[8,8]{1,0} all-reduce-start(%m.3), channel_id=1, to_apply=%sum.1
  %done.3 = f32[8,8]{1,0} all-reduce-done(%start.3)
  ROOT %out.3 = (f32[8,8]{1,0}) tuple(%done.3)
}

%usually (arg.4: (f32[8,8])) -> (f32[8,8]) {
  ROOT %arg.4 = (f32[8,8]{1,0}) parameter(0)
}

%called (arg.5: f32[8,8]) -> f32[8,8] {
  %arg.5 = f32[8,8]{1,0} parameter(0)
  ROOT %negate.1 = f32[8,8]{1,0} negate(%arg.5)
}

ENTRY %main (stack: f32[8,1024]) -> f32[1024] {
  %stack = f32[8,1024]{1,0:T(8,128)S(1)} parameter(0), metadata={op_name="stack"}
  %rows = f32[1024]{0} fusion(%stack), kind=kLoop, calls=%fused_rows
  %gemm = f32[8,8]{1,0} fusion(%stack, %stack), kind=kCustom, calls=%gemm_computation
  %call.1 = f32[8,8]{1,0} call(%gemm), to_apply=%called
  %start = (f32[8,8]{1,0}, s32[], pred[]) tuple(%call.1)
  %while.1 = (f32[8,8]{1,0}, s32[], pred[]) while(%start), condition=%condition.1, body=%body.1, metadata={op_name="jit(step)/at:3.1/while"}
  %while.2 = (f32[8,8]{1,0}, s32[], pred[]) while(%while.1), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"8"}}
  %choice = (f32[8,8]{1,0}) conditional(%flag, %t.1, %t.2), true_computation=%usually, false_computation=%rarely, metadata={op_name="jit(step)/at:3.2/cond"}
  ROOT %out = f32[1024]{0} bitcast(%rows)
}

%gemm_computation (parameter_0: f32[8,1024], parameter_1: f32[8,1024]) -> f32[8,8] {
  %parameter_0 = f32[8,1024]{1,0} parameter(0)
  %parameter_1 = f32[8,1024]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
"""  # noqa: E501
MATRIX, ROW = 4 * 8 * 8, 4 * 1024


@pytest.mark.parametrize(("turns", "rare"), [(0, 0), (5, 0), (2, 1)])
def test_cost_of_a_program_by_hand(turns, rare):
    """The entry launches three kernels; each of the two loops a copy and a library call; a rare branch communicates."""
    ran = {("3.1", 0): turns, ("3.2", 0): rare, ("3.2", 1): 1 - rare}
    cost = hlo.cost(hlo.program(PROGRAM), lambda op_name, branch: ran[place(op_name), branch])
    assert cost.launches == 3 + 2 * (turns + 8) + (turns + 1) + rare
    assert cost.library == turns + 8
    assert cost.waits == (turns + 1) + 1
    assert cost.iterations == turns
    assert cost.sent == ({f"all-reduce of {MATRIX} bytes": 1} if rare else {})


def test_bytes_are_what_is_read_and_written():
    """An operand counts once, and as its slices if only these are used."""
    own = hlo.program(PROGRAM).bytes
    assert own == (2 * ROW + ROW) + (8 * ROW + MATRIX) + 2 * MATRIX


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[8,3]{1,0:T(8,128)}", 96),
        ("(pred[], s32[2], /*index=2*/bf16[5])", 1 + 8 + 10),
        ("f8e4m3fn[4]", 4),
        ("()", 0),
    ],
)
def test_size_of_a_shape(shape, size):
    assert hlo.size(shape) == size


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="must have an entry"):
        hlo.program("%fused (a: f32[]) -> f32[] {\n}\n")


def test_branches_in_another_order_are_refused():
    swapped = PROGRAM.replace("calls=%gemm_computation", 'calls=%gemm_computation, metadata={op_name="gemm"}').replace(
        "to_apply=%sum.1", 'to_apply=%sum.1, metadata={op_name="jit(step)/at:3.2/cond/branch_1_fun/psum"}'
    )
    with pytest.raises(ValueError, match=r"Branch 0 .* is called 1"):
        hlo.program(swapped)


def collatz(n):
    """The number of steps to 1, in a loop; each odd number is passed to a loop that counts to three."""

    def step(carry):
        n, steps, count = carry
        odd = n % 2 == 1
        count = lax.cond(odd, lambda: lax.fori_loop(0, 3, lambda i, c: c + i % 2, count), lambda: count)
        return jnp.where(odd, 3 * n + 1, n // 2), steps + 1, count

    return lax.while_loop(lambda carry: carry[0] > 1, jax.jit(step), (n, 0, 0))[1:]


# 6, 3, 10, 5, 16, 8, 4, 2, 1 and 27's famous 111 steps, 41 of them from odd numbers
@pytest.mark.parametrize(("n", "steps", "odd"), [(1, 0, 0), (6, 8, 2), (27, 111, 41)])
def test_loops_and_branches_are_counted_and_found_again(n, steps, odd):
    runs = Counter()
    program = jax.jit(named(collatz, "cpu", runs.update))
    assert [int(value) for value in program(n)] == [steps, odd]
    jax.effects_barrier()
    assert sorted(runs.values()) == sorted(count for count in (steps, odd, steps - odd, 3 * odd) if count)

    text = jax.jit(named(collatz, "cpu")).lower(n).compile().as_text()
    cost = hlo.cost(hlo.program(text), lambda op_name, branch: runs[place(op_name), branch])
    assert cost.iterations == steps
    assert cost.waits == (steps + 1) + steps  # the condition of the outer loop, and a choice in each iteration


def test_a_loop_without_a_name_is_refused():
    with pytest.raises(ValueError, match="must hold a place"):
        place("jit(step)/while")


def test_the_branch_of_a_platform_is_the_one_asked_for():
    def function(x):
        return lax.platform_dependent(x, cpu=lambda x: x + 1, default=lambda x: x + 2)

    assert [float(jax.jit(named(function, platform))(0.0)) for platform in ("cpu", "cuda", "tpu")] == [1, 2, 2]


def row(method, target="h100", num_tasks=8, **values):
    return dict.fromkeys(compiled.COLUMNS, "0") | {
        "method": method,
        "target": target,
        "num_tasks": str(num_tasks),
        **values,
    }


def test_tables_by_hand():
    gpu = [
        row("mean", launches="9", launches_worst="9"),
        row("uw", launches="13", launches_worst="13"),
        row("mgda", launches="79", launches_worst="398", waits="5", waits_worst="20"),
    ]
    tpu = [
        row("mgda", "v5e", gradients="17"),
        row("cagrad", "v5e", gradients="17.5"),
        row("mgda", "v5e:2x2", sent="1 all-reduce of 256 bytes"),
    ]
    _, _, together, alone = compiled.gpu_table(gpu + tpu).splitlines()
    assert together.endswith("| 9-13 + 0 | 36-52 | 36-52 |")
    assert alone == f"| `mgda` | 79 + 5 | {79 * 4 + 5 * 10} | {398 * 4 + 20 * 10} |"
    *_, kind = compiled.tpu_table(gpu + tpu).splitlines()
    assert kind.endswith(f"| `mgda`, `cagrad` | 17-17.5 | 1.00-{17.5 / 17:.2f} | 1 all-reduce of 256 bytes |")


def sending(*shapes, operation="all-reduce"):
    return hlo.Part(collectives=[hlo.Instruction("sent", shape, operation, "") for shape in shapes])


@pytest.mark.parametrize(
    ("target", "gradients", "program", "sent", "fault"),
    [
        ("v5e", 17.8, hlo.Part(), "", None),
        ("v5e", 18.0, hlo.Part(), "", "moves 18 gradients where 17 are enough"),
        ("v5e:2x2", 17.0, sending("f32[8,8]"), "1 all-reduce of 256 bytes", None),
        ("v5e:2x2", 17.0, sending("f32[8,8]"), "1 a; 1 b", "sends 1 a; 1 b"),
        ("v5e:2x2", 17.0, sending("f32[8,99]"), "1 all-reduce of 3168 bytes", "sends all-reduce of 3168 bytes"),
        (
            "v5e:2x2",
            17.0,
            hlo.Part(loops=[hlo.Loop("", sending("f32[]", operation="all-gather"), hlo.Part(), 1)]),
            "",
            "sends all-gather of 4 bytes",
        ),
    ],
)
def test_faults(target, gradients, program, sent, fault):
    found = compiled.faults(
        {"method": "mgda", "target": target, "num_tasks": 8, "gradients": gradients, "sent": sent}, program
    )
    assert found == ([fault] if fault else [])
