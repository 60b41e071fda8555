"""Every pair of options, in small models: they learn, save, generate, count and declare."""

import pytest
import torch

from model.build import build_model
from model.count import parameter_count
from model.generate import generate
from model.loss import IGNORE_INDEX
from model.reader import pad_left
from model.weights import declared_weights
from tests.model.variants import build, config_of, lively, pairwise, random_tokens

CHOICES = pairwise()
NAMES = ["-".join(str(value) for value in choice.values()) for choice in CHOICES]
every_pair = pytest.mark.parametrize("choice", CHOICES, ids=NAMES)


@every_pair
def test_learns_and_loads(choice, tmp_path):
    config = config_of(choice)
    model = build(config)
    tokens = random_tokens(config, 2, 12)
    targets = tokens.roll(-1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.loss_sum(tokens, targets) / targets.numel()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    again = build_model(config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens), model(tokens))


@every_pair
def test_both_losses_agree(choice):
    config = config_of(choice)
    model = build(config).double()
    tokens = random_tokens(config, 2, 12)
    targets = tokens.roll(-1, 1)
    targets[0, :5] = IGNORE_INDEX
    logits, mean = model(tokens, targets=targets)
    torch.testing.assert_close(logits, model(tokens))
    summed = model.loss_sum(tokens, targets) / 19
    torch.testing.assert_close(summed, mean)
    assert mean.dtype == torch.float64
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(summed, parameters), torch.autograd.grad(mean, parameters))


@every_pair
def test_declares_and_counts(choice):
    config = config_of(choice)
    with torch.device("meta"):
        model = build_model(config)
    declared = declared_weights(model)
    parameters = dict(model.named_parameters())
    assert declared.keys() == parameters.keys()
    for name, weight in declared.items():
        cuts_input = weight.sharding in ("row", "heads_in")
        assert weight.sharding == "replicated" or parameters[name].dim() > cuts_input
    count = parameter_count(config)
    assert count.total == sum(p.numel() for p in parameters.values())
    assert count.embedding + count.non_embedding == count.total


@every_pair
def test_cached_generation_is_uncached_generation(choice):
    config = config_of(choice)
    model = lively(config)
    prompt = random_tokens(config, 3, 4)
    if config.attention.mask_type == "bidirectional":
        with pytest.raises(ValueError, match=r"mask_type=bidirectional can't generate"):
            generate(model, prompt, 12)
        return
    cached, uncached = (generate(model, prompt, 12, temperature=0, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


@every_pair
def test_a_left_padded_batch_goes_on_as_its_rows_do_alone(choice):
    config = config_of(choice)
    if config.attention.mask_type == "bidirectional":
        return
    model = lively(config)
    prompts = [random_tokens(config, 1, length, seed=length)[0].tolist() for length in (2, 7)]
    tokens, padding = pad_left(prompts)
    alone = [generate(model, torch.tensor([prompt]), 10, temperature=0)[0, -10:] for prompt in prompts]
    for use_cache in (True, False):
        made = generate(model, tokens, 10, temperature=0, padding=padding, use_cache=use_cache)
        assert torch.equal(made[:, 7:], torch.stack(alone))


@every_pair
def test_later_tokens_change_nothing_before_them(choice):
    config = config_of(choice)
    model = build(config).double()
    tokens = random_tokens(config, 1, 12)
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % config.vocab_size
    # of an expert's product the last bits depend on how many tokens it has
    equal = ((model(tokens) - model(changed)).abs() < 1e-12).all(dim=-1)[0]
    assert equal[:7].all() == (config.attention.mask_type != "bidirectional")
    assert not equal[7]
