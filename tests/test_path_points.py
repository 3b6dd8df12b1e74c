"""Points between a base checkpoint and a final one: what each parameter's line starts from."""

import copy

import models
import pytest
import torch

from hf_trak.sources.path_points import measure_statistics, move_to_point, scale_adapter, set_statistics, statistics_rows


def moved(model, seed=1, size=0.1):
    """A model trained on from `model`, as far as weights tell."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture
def pair():
    torch.manual_seed(0)
    base = models.bert()
    return base, moved(base)


def test_a_point_lies_on_the_line(pair):
    base, final = pair
    point = copy.deepcopy(final)
    report = move_to_point(point, base.state_dict(), 0.3)
    for (name, found), start, end in zip(point.named_parameters(), base.parameters(), final.parameters(), strict=True):
        expected = start.double() + 0.3 * (end.double() - start.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7, msg=name)
    assert set(report.from_base) == set(dict(final.named_parameters()))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_are_the_two_checkpoints(pair, alpha):
    base, final = pair
    point = copy.deepcopy(final)
    move_to_point(point, base.state_dict(), alpha)
    for found, expected in zip(point.parameters(), (base, final)[int(alpha)].parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_new_head_counts_from_zero_or_from_its_initial_value(pair):
    base, final = pair
    without_head = {name: value for name, value in base.state_dict().items() if not name.startswith("classifier")}
    point = copy.deepcopy(final)
    report = move_to_point(point, without_head, 0.5)
    assert report.from_zero == ("classifier.weight", "classifier.bias")
    assert torch.equal(point.classifier.weight, 0.5 * final.classifier.weight)

    point = copy.deepcopy(final)
    report = move_to_point(point, without_head, 0.5, initial={"classifier.weight": base.classifier.weight})
    assert (report.from_initial, report.from_zero) == (("classifier.weight",), ("classifier.bias",))
    torch.testing.assert_close(point.classifier.weight, (final.classifier.weight + base.classifier.weight) / 2)


def test_a_norm_and_an_embedding_that_the_base_lacks_keep_their_final_values(pair):
    base, final = pair
    lacking = {
        name: value
        for name, value in base.state_dict().items()
        if "position_embeddings" not in name and "layer.1.output.LayerNorm" not in name
    }
    point = copy.deepcopy(final)
    report = move_to_point(point, lacking, 0.5)
    kept = {
        "bert.embeddings.position_embeddings.weight",
        "bert.encoder.layer.1.output.LayerNorm.weight",
        "bert.encoder.layer.1.output.LayerNorm.bias",
    }
    assert set(report.kept) == kept
    named, before = dict(point.named_parameters()), dict(final.named_parameters())
    assert all(torch.equal(named[name], before[name]) for name in kept)


def test_rows_added_to_a_vocabulary_keep_their_final_values():
    torch.manual_seed(0)
    base = models.bert(vocab_size=1100)
    final = moved(base)
    grown = copy.deepcopy(final)
    grown.resize_token_embeddings(1105)
    point = copy.deepcopy(grown)
    move_to_point(point, base.state_dict(), 0.5)
    old, new = final.get_input_embeddings().weight, point.get_input_embeddings().weight
    torch.testing.assert_close(new[:1100], (old + base.get_input_embeddings().weight) / 2)
    assert torch.equal(new[1100:], grown.get_input_embeddings().weight[1100:])


def test_statistics_of_batch_norm_move_with_the_weights():
    torch.manual_seed(0)
    base, final = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)), None
    final = moved(base)
    final[1].running_mean.add_(2.0)
    final[1].running_var.mul_(3.0)
    move_to_point(final, base.state_dict(), 0.5)
    assert torch.equal(final[1].running_mean, torch.ones(4))
    assert torch.equal(final[1].running_var, torch.full((4,), 2.0))
    assert final[1].num_batches_tracked.dtype == torch.int64


def test_statistics_are_measured_where_training_moved_them():
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(4, 4),
        torch.nn.BatchNorm1d(4),
        torch.nn.SyncBatchNorm(4),
        torch.nn.InstanceNorm1d(4, track_running_stats=True),
    ]
    base = torch.nn.ModuleList([*layers, torch.nn.BatchNorm1d(4, track_running_stats=False)])
    final = moved(base)
    with torch.no_grad():
        for norm in (final[2], final[3]):  # the first was frozen
            norm.running_var.mul_(3.0)
    assert move_to_point(final, base.state_dict(), 0.5).measured == ("2", "3")
    values = torch.randn(2, 6, 4, 5) * 2 + 1
    found = measure_statistics(final, ("2", "3"), values, lambda batch: [final[2](batch), final[3](batch)])
    places = torch.var_mean(values.double(), dim=(1, 3))
    torch.testing.assert_close(found["2.running_var"].double(), places[0].mean(0))
    torch.testing.assert_close(found["2.running_mean"].double(), places[1].mean(0))
    own = torch.nn.InstanceNorm1d(4, momentum=1.0, track_running_stats=True).double()
    each = [(own(batch.double()), own.running_var.clone())[1] for batch in values]
    torch.testing.assert_close(found["3.running_var"].double(), torch.stack(each).mean(0))
    again = moved(base)
    set_statistics(again, ("2", "3"), found)
    assert torch.equal(again[3].running_var, found["3.running_var"])
    with pytest.raises(ValueError, match="a batch of them has one value per channel"):
        measure_statistics(final, ("1",), [torch.ones(1, 4)], final[1])


class WithActivation(torch.nn.BatchNorm2d):
    """As timm has them: more happens in `forward` than normalising."""

    def forward(self, hidden):
        return super().forward(hidden).relu()


def test_a_batch_norm_with_a_forward_of_its_own_keeps_it():
    torch.manual_seed(0)
    net = torch.nn.Sequential(WithActivation(3), torch.nn.Conv2d(3, 2, 2), torch.nn.BatchNorm2d(2)).eval()
    expected = copy.deepcopy(net).double().train()
    expected[0].momentum = expected[2].momentum = None
    values = torch.randn(3, 8, 3, 5, 5) * 2 + 1
    found = measure_statistics(net, ("0", "2"), values, net)
    for batch in values:
        expected(batch.double())
    assert not any(module.training for module in net.modules())
    for name, statistic in found.items():
        torch.testing.assert_close(statistic.double(), expected.get_buffer(name), rtol=1e-5, atol=1e-6)


def test_rows_for_statistics_are_drawn_and_no_batch_is_of_one():
    assert [len(batch) for batch in statistics_rows(65)] == [33, 32]
    drawn = [row for batch in statistics_rows(2000) for row in batch]
    assert len(drawn) == len(set(drawn)) == 512
    assert drawn[:4] != sorted(drawn[:4])


def test_half_precision_is_rounded_once():
    torch.manual_seed(0)
    base = models.bert()
    final = moved(base).to(torch.bfloat16)
    half = {name: value.to(torch.bfloat16) for name, value in base.state_dict().items()}
    point = copy.deepcopy(final)
    move_to_point(point, half, 0.3)
    name = "classifier.weight"
    expected = half[name].double() + 0.3 * (final.state_dict()[name].double() - half[name].double())
    assert torch.equal(point.state_dict()[name], expected.to(torch.bfloat16))


def test_another_models_base_is_refused(pair):
    _, final = pair
    other = models.bert(hidden_size=32, intermediate_size=40)
    with pytest.raises(ValueError, match="not what the final model was trained from"):
        move_to_point(copy.deepcopy(final), other.state_dict(), 0.5)


def test_a_base_that_is_the_final_model_is_refused(pair):
    _, final = pair
    with pytest.raises(ValueError, match="no path between them"):
        move_to_point(copy.deepcopy(final), final.state_dict(), 0.5)


def test_a_point_beyond_the_ends_is_refused(pair):
    base, final = pair
    with pytest.raises(ValueError, match="between 0"):
        move_to_point(final, base.state_dict(), 1.5)


def test_alpha_scales_what_an_adapter_adds():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = models.bert()
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    full, half = copy.deepcopy(model).merge_and_unload(), copy.deepcopy(model)
    report = scale_adapter(half, 0.5)
    merged = half.merge_and_unload()
    for name, parameter in base.named_parameters():
        middle = (dict(full.named_parameters())[name] + parameter) / 2
        torch.testing.assert_close(dict(merged.named_parameters())[name], middle, rtol=1e-5, atol=1e-6, msg=name)
    assert any("lora_B" in name for name in report.from_zero)
    assert any("modules_to_save" in name for name in report.from_base)


def test_adapters_that_a_factor_does_not_scale_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(models.bert(), peft.LoraConfig(target_modules=["query"], r=2, use_dora=True))
    with pytest.raises(ValueError, match="LoRA adapters only"):
        scale_adapter(model, 0.5)
