"""backend="cpu" as torch sees it: operators, autograd of any order, transforms, tracing."""

import pytest
import torch
from cpu_problems import attend
from strategies import Problem, tensors

import natcupy
from natcupy.arguments import neighborhood
from natcupy.cpu import memory, ops

P = Problem(
    (4, 5), (2, 3), (2, 1), (1, 1), (False, True), rpb=True, extra=2, head_dim=2, value_dim=3
)
HOOD = neighborhood(2, *P.window.values())
SEED = torch.Generator()


def problem(dtype=torch.float64, requires_grad=True, p=P):
    """(function of the tensors alone, the tensors)."""
    inputs = tensors(p, dtype, requires_grad=requires_grad)
    scale = inputs.pop("scale")
    names = list(inputs)

    def run(*values, backend="cpu"):
        named = dict(zip(names, values, strict=True))
        return natcupy.na2d(**named, **p.window, scale=scale, return_lse=True, backend=backend)

    return run, tuple(inputs.values())


def scalar(run, backend):
    def loss(*values):
        out, lse = run(*values, backend=backend)
        return out.sin().sum() + (lse * 0.3).cos().sum()

    return loss


def equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def arguments(values):
    return (*values, *ops._lists(HOOD), 0.7)


def test_gradcheck():
    run, values = problem()
    assert torch.autograd.gradcheck(run, values, check_forward_ad=True)


def test_gradgradcheck():
    run, values = problem()
    assert torch.autograd.gradgradcheck(run, values)


def test_third_derivative():
    run, (query, *rest) = problem()
    orders = []
    for backend in ("cpu", "torch"):
        value = scalar(run, backend)(query, *rest)
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sum(), query, create_graph=True)
        orders.append(value)
    equal(orders[:1], orders[1:])


@pytest.mark.parametrize("needed", range(6))
def test_only_what_is_asked_for(needed):
    run, values = problem(requires_grad=False)
    values[needed].requires_grad_()
    (got,) = torch.autograd.grad(scalar(run, "cpu")(*values), values[needed])
    (expected,) = torch.autograd.grad(scalar(run, "torch")(*values), values[needed])
    equal([got], [expected])


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_result_alone(which):
    run, values = problem()
    got = torch.autograd.grad(run(*values)[which].sin().sum(), values, allow_unused=True)
    want = torch.autograd.grad(
        run(*values, backend="torch")[which].sin().sum(), values, materialize_grads=True
    )
    assert all(a is not None for a in got)
    equal(got, want)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_operators_pass_torchs_own_checks(kv_heads):
    _, values = problem(p=P.but(kv_heads=kv_heads))
    torch.library.opcheck(torch.ops.natcupy.cpu_attention.default, arguments(values))
    bare = (*values[:3], None, None, None)
    torch.library.opcheck(torch.ops.natcupy.cpu_attention.default, arguments(bare))
    for given in (values, bare):
        given = [None if x is None else x.detach() for x in given]
        out, lse = torch.ops.natcupy.cpu_attention(*arguments(given))
        for grad_lse in (None, torch.randn_like(lse)):
            grads = torch.randn_like(out), grad_lse
            wants = (True, True, given[3] is not None)
            torch.library.opcheck(
                torch.ops.natcupy.cpu_attention_backward.default,
                (*grads, *arguments(given), *wants),
            )


def test_operator_equals_the_way_around_the_dispatcher():
    _, values = problem(torch.float32)
    scale = P.head_dim**-0.5
    around = ops.attention(*values[:3], HOOD, scale, *values[3:])
    through = torch.ops.natcupy.cpu_attention(*values, *ops._lists(HOOD), scale)
    for a, b in zip(around, through, strict=True):
        assert torch.equal(a, b)
    cotangents = [torch.randn_like(x) for x in around]
    for a, b in zip(
        torch.autograd.grad(around, values, cotangents),
        torch.autograd.grad(through, values, cotangents),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_as_one_graph(compiler):
    torch._dynamo.reset()
    run, values = problem(torch.float32)
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    results, expected = compiled(*values), run(*values)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)
    cotangents = [torch.randn_like(x) for x in expected]
    got = torch.autograd.grad(results, values, cotangents)
    for a, b in zip(got, torch.autograd.grad(expected, values, cotangents), strict=True):
        assert torch.equal(a, b)


def test_exported():
    run, values = problem(torch.float32, requires_grad=False)

    class Wrapped(torch.nn.Module):
        def forward(self, *values):
            return run(*values)

    program = torch.export.export(Wrapped(), values)
    for a, b in zip(program.module()(*values), run(*values), strict=True):
        assert torch.equal(a, b)


def test_traced_shapes_are_those_of_the_results():
    run, values = problem(torch.bfloat16, requires_grad=False)
    real = run(*values)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.natcupy.cpu_attention(*arguments([mode.from_tensor(x) for x in values]))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("batched", ["all", "query", "key and rpb", "additional_values"])
def test_vmap(batched):
    run, values = problem(requires_grad=False)
    names = ["query", "key", "value", "rpb", "additional_keys", "additional_values"]
    moved = [batched == "all" or name in batched.split(" and ") for name in names]
    stacked = [
        torch.stack([x, 2 * x, x - 1], 1) if m else x for x, m in zip(values, moved, strict=True)
    ]
    dims = tuple(1 if m else None for m in moved)
    got = torch.vmap(run, dims)(*stacked)
    rows = [
        run(*(x.select(1, i) if m else x for x, m in zip(stacked, moved, strict=True)))
        for i in range(3)
    ]
    equal(got, [torch.stack(column) for column in zip(*rows, strict=True)])


def test_vmap_over_the_backward_operator():
    run, values = problem()
    cotangents = [torch.randn(5, *x.shape, dtype=torch.float64) for x in run(*values)]
    got = torch.autograd.grad(
        torch.ops.natcupy.cpu_attention(*values, *ops._lists(HOOD), P.head_dim**-0.5),
        values,
        cotangents,
        is_grads_batched=True,
    )
    for i in range(5):
        expected = torch.autograd.grad(run(*values), values, [c[i] for c in cotangents])
        equal([x[i] for x in got], expected)


def test_gradients_for_a_batch_of_cotangents():
    """`is_grads_batched`, which vectorized jacobians use, around a plain call."""
    run, values = problem()
    results = run(*values)
    cotangents = [torch.randn(3, *x.shape, dtype=torch.float64) for x in results]
    got = torch.autograd.grad(results, values, cotangents, is_grads_batched=True)
    for i in range(3):
        expected = torch.autograd.grad(run(*values), values, [c[i] for c in cotangents])
        equal([x[i] for x in got], expected)


def test_torchs_default_device_is_not_ours():
    """Results lie where the inputs do; a kernel must not write to another device's addresses."""
    run, values = problem()
    memory.forget()
    ops.kernels.kernel.cache_clear()
    with torch.device("meta"):
        results = run(*values)
        sum(x.sum() for x in results).backward()
    again = run(*values)
    equal(results, again)
    equal([x.grad for x in values], torch.autograd.grad(sum(x.sum() for x in again), values))


TRANSFORMS = {
    "grad": lambda f, v: torch.func.grad(f, tuple(range(6)))(*v),
    "vmap of grad": lambda f, v: torch.vmap(torch.func.grad(f))(
        *(torch.stack((x, x + 1)) for x in v)
    ),
    "jvp": lambda f, v: torch.func.jvp(f, v, v),
    "jvp of grad": lambda f, v: torch.func.jvp(torch.func.grad(f), v, v),
    "hessian": lambda f, v: [torch.func.hessian(f)(*v)],
    "jacrev of jacrev": lambda f, v: [torch.func.jacrev(torch.func.jacrev(f))(*v)],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_function_transforms(transform):
    run, values = problem(requires_grad=False)
    got, expected = (transform(scalar(run, backend), values) for backend in ("cpu", "torch"))
    flat = torch.utils._pytree.tree_leaves
    equal(flat(got), flat(expected))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_compiled_function_transforms(transform):
    torch._dynamo.reset()
    run, values = problem(requires_grad=False)
    got = torch.compile(lambda *v: transform(scalar(run, "cpu"), v), backend="eager")(*values)
    flat = torch.utils._pytree.tree_leaves
    equal(flat(got), flat(transform(scalar(run, "torch"), values)))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "vmap of grad"])
def test_a_graph_made_outside_a_transform(transform, create_graph):
    """It is differentiated inside: what is wrapped are the cotangents alone."""
    found = []
    for backend in ("cpu", "torch"):
        run, values = problem()
        out, _ = run(*values, backend=backend)
        first, second = torch.randn(2, *out.shape, generator=SEED.manual_seed(0), dtype=out.dtype)

        def pull_back(cotangent, out=out, values=values):
            return torch.autograd.grad(
                out, values, cotangent, retain_graph=True, create_graph=create_graph
            )

        def loss(cotangent, pull_back=pull_back):
            return sum(x.square().sum() for x in pull_back(cotangent))

        both = torch.stack((first, second))
        found.append(
            {
                "vmap": lambda f=pull_back, both=both: torch.vmap(f)(both),
                "grad": lambda f=loss, x=first: torch.func.grad(f)(x),
                "jvp": lambda f=pull_back, x=first, t=second: torch.func.jvp(f, (x,), (t,)),
                "vmap of grad": lambda f=loss, both=both: torch.vmap(torch.func.grad(f))(both),
            }[transform]()
        )
    flat = torch.utils._pytree.tree_leaves
    equal(flat(found[0]), flat(found[1]))


def test_a_step_is_compiled_for_growing_sizes():
    """Its backward pass alone is: that of a call outside, of sizes that then become symbols."""
    torch._dynamo.reset()
    step = torch.compile(lambda out: out.square().sum().backward(), backend="eager")
    for length in (6, 7, 8):
        query = torch.randn(1, length, length, 2, 8, dtype=torch.float64, requires_grad=True)
        step(natcupy.na2d(query, query, query, 3, backend="cpu"))
        out = natcupy.na2d(query, query, query, 3, backend="torch")
        equal([query.grad], torch.autograd.grad(out.square().sum(), query))


def test_autocast():
    p = P.but(head_dim=8, value_dim=8)
    inputs = tensors(p, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(p, inputs).dtype == torch.bfloat16


def test_reason_names_the_device():
    x = torch.empty(1, 4, 5, 1, 2, device="meta")
    assert "meta" in natcupy.cpu.unsupported_reason(x, x, x, HOOD, None, None, None)
