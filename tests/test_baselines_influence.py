"""Influence functions against the whole Hessian, and EK-FAC against its definition, on models small enough to hold them."""

import importlib.util

import numpy as np
import pytest
import torch
from datasets_for_tests import image_rows, token_rows
from models import bert, llama_lm, make_batch, make_model
from reference import gradient_loop
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_trak import TrakConfig
from hf_trak.evaluation.baselines import ArnoldiInfluence, Checkpoints, EKFACInfluence
from hf_trak.evaluation.baselines.arnoldi import Subspace, arnoldi, loss_hessian
from hf_trak.evaluation.baselines.base import project_gradients
from hf_trak.tasks import AutoTask

HEAD = ("classifier.weight", "classifier.bias")
needs_kronfluence = pytest.mark.skipif(importlib.util.find_spec("kronfluence") is None, reason="kronfluence is not installed")


def whole_hessian(model, batch, names):
    """The Hessian of the mean cross-entropy, as a matrix, in float64."""
    model = model.double().eval()
    chosen = {name: parameter.detach() for name, parameter in model.named_parameters() if name in names}
    sizes = [parameter.numel() for parameter in chosen.values()]
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch.items() if k != "labels"}

    def loss(flat):
        pieces = {name: x.view(chosen[name].shape) for name, x in zip(chosen, flat.split(sizes), strict=True)}
        return F.cross_entropy(functional_call(model, pieces, kwargs=inputs).logits, batch["labels"])

    with sdpa_kernel(SDPBackend.MATH):
        return hessian(loss, torch.cat([parameter.flatten() for parameter in chosen.values()]))


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_hessian_vector_products_are_those_of_the_whole_matrix(name):
    model = make_model(name).double()
    config = TrakConfig(parameters=("classifier", r"(query|q_proj)\.bias"), proj_dim=8)
    featurizer = Checkpoints(model, config).featurizer(0)
    batch = make_batch(name)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    names = list(featurizer.selection.parameters)
    expected = whole_hessian(make_model(name), batch, names)
    parts = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
    vector = torch.randn(len(expected), dtype=torch.float64)
    found = loss_hessian(featurizer, parts)(vector)
    torch.testing.assert_close(found, expected @ vector, rtol=1e-8, atol=1e-12)
    assert expected[-51:, :32].abs().max() > 1e-8  # the two kinds of layers do interact


def test_arnoldi_finds_the_top_of_the_spectrum():
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=generator))
    spectrum = torch.cat([torch.tensor([9.0, 5.0, 3.0, -7.0]), torch.linspace(-0.1, 0.1, 36)]).double()
    matrix = rotation @ torch.diag(spectrum) @ rotation.T
    start = torch.randn(40, dtype=torch.float64, generator=generator)
    pairs = arnoldi(lambda vector: matrix @ vector, start, n_iterations=20, n_eigenvectors=3)
    torch.testing.assert_close(pairs.values, torch.tensor([9.0, 5.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close((pairs.vectors @ rotation[:, :3]).abs(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_arnoldi_stops_where_the_krylov_space_ends_and_leaves_out_negative_curvature():
    matrix = torch.diag(torch.tensor([2.0, 1.0, -3.0, 0.0, 0.0], dtype=torch.float64))
    pairs = arnoldi(lambda v: matrix @ v, torch.ones(5, dtype=torch.float64), n_iterations=5, n_eigenvectors=5)
    torch.testing.assert_close(pairs.values, torch.tensor([2.0, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="not near a minimum"):
        arnoldi(lambda v: -v, torch.ones(5, dtype=torch.float64), n_iterations=2, n_eigenvectors=1)
    with pytest.raises(ValueError, match="from 1 to `n_iterations`, but they are 3 and 2"):
        arnoldi(lambda v: v, torch.ones(5), n_iterations=2, n_eigenvectors=3)


@pytest.mark.parametrize("name", ["bert", "resnet", "tied"])
def test_a_subspaces_coordinates_are_inner_products_with_whole_gradients(name):
    model = make_model(name).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in make_batch(name).items()}
    task = AutoTask.from_model(make_model("bert")) if name == "tied" else None
    config = TrakConfig(proj_dim=8)
    featurizer = Checkpoints(model, config, task=task).featurizer(0)
    parameters = featurizer.selection.parameters
    generator = torch.Generator().manual_seed(0)
    vectors = {n: torch.randn(3, *p.shape, dtype=torch.float64, generator=generator) for n, p in parameters.items()}
    found = project_gradients(featurizer, batch, Subspace(vectors)).features
    grads = gradient_loop(model, batch, featurizer.task.output_function, list(parameters))[2]
    torch.testing.assert_close(found, grads @ torch.cat([v.flatten(1) for v in vectors.values()], 1).T, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n_eigenvectors", [3, 10])
def test_influence_is_that_of_the_whole_hessians_top_eigenvectors(n_eigenvectors):
    train, queries = token_rows(12, seed=1), token_rows(4, seed=2)
    models = [make_model("bert", seed=seed) for seed in (0, 1)]
    expected = np.zeros((12, 4))
    for seed in (0, 1):
        model = make_model("bert", seed=seed).double()
        task = AutoTask.from_model(model)
        batches = [task.collate(dataset[:], None) for dataset in (train, queries)]
        values, vectors = torch.linalg.eigh(whole_hessian(model, batches[0], HEAD))
        values, vectors = values[-n_eigenvectors:], vectors[:, -n_eigenvectors:]
        _, out_to_loss, grads = gradient_loop(model, batches[0], task.output_function, HEAD)
        query_grads = gradient_loop(model, batches[1], task.output_function, HEAD)[2]
        influence = (out_to_loss[:, None] * grads @ vectors / values) @ (query_grads @ vectors).T
        expected += influence.numpy() / 2
    config = TrakConfig(parameters=("classifier",))
    for model in models:
        model.double()
    method = ArnoldiInfluence(Checkpoints(models, config), n_iterations=51, n_eigenvectors=n_eigenvectors, n_hessian_rows=None)
    np.testing.assert_allclose(method(train, queries), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_influence_of_an_example_on_itself_is_positive_and_repeatable():
    train = image_rows(6)
    checkpoints = Checkpoints(make_model("vit"), TrakConfig())
    method = ArnoldiInfluence(checkpoints, n_iterations=8, n_eigenvectors=4, n_hessian_rows=4)
    scores = method(train, train)
    assert (scores.diagonal() > 0).all()
    np.testing.assert_array_equal(scores, method(train, train))
    assert not np.array_equal(scores, ArnoldiInfluence(checkpoints, 8, 4, 4, seed=1)(train, train))


def moments_and_scores(inputs, out_to_loss, delta, query_inputs, query_delta):
    """EK-FAC of one linear layer with a bias, from its inputs and its outputs' gradients of f, in float64.

    Returns scores at a damping of a tenth of the mean eigenvalue.
    """
    inputs, query_inputs = (np.concatenate([x, np.ones((len(x), 1))], 1) for x in (inputs, query_inputs))
    loss_delta = -out_to_loss[:, None] * delta
    _, input_basis = np.linalg.eigh(inputs.T @ inputs / len(inputs))
    _, output_basis = np.linalg.eigh(loss_delta.T @ loss_delta / len(inputs))

    def rotate(delta, inputs):
        return (delta @ output_basis)[:, :, None] * (inputs @ input_basis)[:, None, :]

    grads = rotate(loss_delta, inputs)
    eigenvalues = np.square(grads).mean(0)
    preconditioned = rotate(query_delta, query_inputs) / (eigenvalues + 0.1 * eigenvalues.mean())
    return -np.einsum("ioj,qoj->iq", grads, preconditioned)


@needs_kronfluence
def test_ekfac_is_its_definition_on_one_layer():
    train, queries = token_rows(40, seed=1), token_rows(5, seed=2)
    model = make_model("bert").eval()
    task = AutoTask.from_model(model)
    sides = []
    for dataset in (train, queries):
        batch = task.collate(dataset[:], None)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            hidden = model.bert(**inputs).pooler_output
        logits = model.classifier(hidden).detach().double().requires_grad_(True)
        output, out_to_loss = task.output_function(lambda logits=logits, **_: type("R", (), {"logits": logits}), batch)
        delta = torch.autograd.grad(output.sum(), logits)[0]
        sides.append((hidden.double().numpy(), out_to_loss.numpy(), delta.numpy()))
    (inputs, out_to_loss, delta), (query_inputs, _, query_delta) = sides
    expected = moments_and_scores(inputs, out_to_loss, delta, query_inputs, query_delta)
    checkpoints = Checkpoints(model, batch_size=7)
    found = EKFACInfluence(checkpoints, modules=["classifier"], empirical_fisher=True)(train, queries)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@needs_kronfluence
@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_ekfac_leaves_the_model_as_it_was_and_is_repeatable(name):
    train = token_rows(6) if name == "bert" else image_rows(6)
    model = make_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    method = EKFACInfluence(Checkpoints(model, batch_size=4))
    scores = method(train, train.select(range(3)))
    assert scores.shape == (6, 3)
    assert (scores[:3].diagonal() > 0).all()
    if name == "bert":
        np.testing.assert_array_equal(method(train, train.select(range(3))), scores)
    assert list(model.state_dict()) == list(before)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training


@needs_kronfluence
def test_ekfac_serves_regressions():
    train = token_rows(6).rename_column("label", "labels")
    model = make_model("bert")
    regression = bert(num_labels=1)
    regression.bert.load_state_dict(model.bert.state_dict())
    train = train.cast_column("labels", __import__("datasets").Value("float32"))
    scores = EKFACInfluence(Checkpoints(regression, batch_size=3))(train, train)
    assert np.isfinite(scores).all()
    assert np.abs(scores).max() > 0


@needs_kronfluence
def test_ekfac_of_a_language_model_is_its_definition_on_one_layer():
    """The last layer's inputs are the hidden states; gradients of a row are sums over its tokens."""
    train, queries = token_rows(12, seed=1), token_rows(3, seed=2)
    model = llama_lm().eval()
    task = AutoTask.from_model(model)
    checkpoints = Checkpoints(model, batch_size=5)
    found = EKFACInfluence(checkpoints, modules=["lm_head"], strategy="identity", empirical_fisher=True, damping=0.0)(
        train, queries
    )
    grads = []
    for dataset, sign in ((train, 1), (queries, -1)):
        batch = task.collate(dataset.remove_columns("label")[:], None)
        rows = []
        for row in range(len(dataset)):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            if sign == 1:
                value = -model(**one).loss * (one["labels"][:, 1:] != -100).sum()  # the sum of log p
            else:
                value = task.output_function(model, one)[0].sum()
            rows.append(torch.autograd.grad(value, model.lm_head.weight)[0].flatten())
        grads.append(torch.stack(rows))
    expected = (grads[0] @ grads[1].T).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
