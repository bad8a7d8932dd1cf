"""PDLSFTTrainer: the training of a plain loop with PDL, with TRL's masks, packing and metrics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pdl_ext import PDLLoss, TokenFrequency, modulation

trl = pytest.importorskip("trl", reason="needs pdl_ext[trl]")
datasets = pytest.importorskip("datasets", reason="needs pdl_ext[trl]")
tokenizers = pytest.importorskip("tokenizers", reason="needs pdl_ext[trl]")

import transformers as tr  # noqa: E402
from packaging.version import Version  # noqa: E402
from test_transformers import V, batch, check_same, model_of, weights_of  # noqa: E402

from pdl_ext.integrations.transformers import apply_pdl_loss  # noqa: E402
from pdl_ext.integrations.trl import PDLSFTTrainer  # noqa: E402

STEPS = 3
# Which trains without logits. Earlier ones call the model's loss, and read the logits for their metrics.
HAS_A_HEAD_OF_ITS_OWN = Version(trl.__version__) >= Version("1.16")
# Nothing but the words of the turns.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}{{ ' ' }}
{%- else %}{{ message['content'] + ' ' }}
{%- endif %}
{%- endfor %}"""


def tokenizer():
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, V)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return tr.PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=CHAT_TEMPLATE, **special)


def rows(masked: str | None):
    """Token ids, and a column that leaves out some of them."""
    ids = batch(3, 24)["input_ids"].tolist()
    # Of different lengths, so that there is something to pad and to pack.
    lengths = [4 + number % 9 for number in range(len(ids))]
    data = {"input_ids": [row[:length] for row, length in zip(ids, lengths, strict=True)]}
    if masked == "completion_mask":
        data[masked] = [[0, 0] + [1] * (length - 2) for length in lengths]
    if masked == "messages":
        turns = [("user", slice(1)), ("assistant", slice(1, 2)), ("user", slice(2, 3)), ("assistant", slice(3, None))]
        words = [[f"w{number}" for number in row] for row in data.pop("input_ids")]
        data[masked] = [
            [{"role": role, "content": " ".join(row[part])} for role, part in turns if row[part]] for row in words
        ]
    return datasets.Dataset.from_dict(data)


def trainer_of(kind, folder, masked, *, model=None, **options):
    settings = {"per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 0.05, "optim": "sgd"}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 3}
    settings |= {"logging_steps": 1, "max_length": 24, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
    settings |= {"bf16": False, "gradient_checkpointing": False}
    passed = {key: options.pop(key) for key in ("pdl_loss", "peft_config", "compute_loss_func") if key in options}
    return kind(
        model_of("llama") if model is None else model,
        args=trl.SFTConfig(output_dir=str(folder), **{**settings, **options}),
        train_dataset=rows(masked),
        eval_dataset=rows(masked).select(range(4)),
        processing_class=tokenizer(),
        **passed,
    )


def by_hand(batches, loss_fn, items):
    """SGD on the very batches that the trainer had, with the loss of all logits."""
    model = model_of("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for taken, denominator in zip(batches, items, strict=True):
        labels = taken.pop("labels")
        loss = loss_fn(model(**taken).logits, labels, shift=True, normalizer=denominator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


class Recorded(PDLSFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            self.batches = [*getattr(self, "batches", []), dict(inputs)]
            self.items = [*getattr(self, "items", []), num_items_in_batch]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


CASES = {
    "plain": (None, {}),
    "completions": ("completion_mask", {"completion_only_loss": True}),
    "assistants": ("messages", {"assistant_only_loss": True}),
    "packed": (None, {"packing": True, "packing_strategy": "wrapped"}),
    "packed, best fit": (None, {"packing": True, "packing_strategy": "bfd"}),
    "padding-free": (None, {"padding_free": True, "max_length": None}),
}
BEGINNINGS = {"completion_mask": [False, False, True], "messages": [False, True, False]}
OPTIONS = {
    "given": {},
    "online": {"frequency": None},
    "every option": {"modulation": modulation.Focal(), "label_smoothing": 0.1, "z_loss": 0.01},
}


def losses(name):
    """Two equal losses: one for the trainer and one for the loop."""
    counted = TokenFrequency(V)
    counted.update(batch(9, 64)["input_ids"])
    options = {"frequency": counted, "alpha": 0.5, **OPTIONS[name]}
    return PDLLoss(**options), PDLLoss(**options)


@pytest.mark.parametrize(
    ("case", "options"), [(case, "given") for case in CASES] + [("completions", name) for name in OPTIONS]
)
@pytest.mark.filterwarnings("ignore:.*padding-free.*", "ignore:.*attention.*")
def test_a_training_is_that_of_a_loop(case, options, tmp_path):
    masked, settings = CASES[case]
    of_trainer, of_loop = losses(options)
    trainer = trainer_of(Recorded, tmp_path, masked, pdl_loss=of_trainer, **settings)
    before = weights_of(trainer.model)
    trainer.train()
    assert len(trainer.batches) == STEPS
    if masked:
        for taken in trainer.batches:
            learned = (taken["labels"] != -100) & (taken["input_ids"] != 0)
            assert learned[:, :3].tolist() == [BEGINNINGS[masked]] * 4
    moved = {name: value - before[name] for name, value in weights_of(trainer.model).items()}
    # As TRL sets it: packed sequences are kept apart then.
    batches = [{**taken, "use_cache": False} for taken in trainer.batches]
    expected = by_hand(batches, of_loop, trainer.items)
    check_same(moved, {name: value - before[name] for name, value in expected.items()}, 2e-4)
    if options == "online":
        assert torch.equal(of_trainer.frequency.counts, of_loop.frequency.counts)
    logged = trainer.state.log_history[0]
    # TRL's metrics, of the same rows.
    model, taken = model_of("llama"), trainer.batches[0]
    logits = model(**batches[0]).logits[:, :-1]
    counted = taken["labels"][:, 1:] != -100
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[counted].mean()
    correct = (logits.argmax(-1) == taken["labels"][:, 1:])[counted].float().mean()
    if HAS_A_HEAD_OF_ITS_OWN:
        # Earlier ones take it over other rows.
        assert logged["entropy"] == pytest.approx(float(entropy), rel=1e-4)
    assert logged["mean_token_accuracy"] == pytest.approx(float(correct), rel=1e-6)
    nll = nn.functional.cross_entropy(logits[counted], taken["labels"][:, 1:][counted])
    assert logged["pdl/nll"] == pytest.approx(float(nll), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2, a softcap", "granite, a divisor", "mixtral, a router's loss"])
def test_with_equal_weights_it_is_the_training_of_trl(family, tmp_path):
    moved = []
    for kind, options in ((trl.SFTTrainer, {}), (PDLSFTTrainer, {"pdl_loss": PDLLoss(alpha=0.0)})):
        settings = {"gradient_accumulation_steps": 2, "completion_only_loss": True}
        trainer = trainer_of(kind, tmp_path, "completion_mask", model=model_of(family), **options, **settings)
        before = weights_of(trainer.model)
        trainer.train()
        moved.append({name: value - before[name] for name, value in weights_of(trainer.model).items()})
    check_same(moved[1], moved[0], 2e-4)


@pytest.mark.skipif(not HAS_A_HEAD_OF_ITS_OWN, reason="TRL before 1.16 reads the logits for its metrics")
def test_no_logits_are_made_in_training(tmp_path):
    from test_transformers import LargestTensor

    sizes = {"vocab_size": 50_257, "max_position_embeddings": 512}
    trainer = trainer_of(PDLSFTTrainer, tmp_path, None, model=model_of("llama", **sizes), pdl_loss=PDLLoss())
    ids = torch.randint(3, 50_257, (4, 512))
    inputs = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    trainer.model.train()
    with LargestTensor() as largest:
        trainer.compute_loss(trainer.model, inputs).backward()
    assert trainer.model.lm_head.weight.grad.any()
    assert largest.elements < 4 * 512 * 50_257 / 2


def test_evaluation_is_plain(tmp_path):
    trainer = trainer_of(
        PDLSFTTrainer, tmp_path, "completion_mask", pdl_loss=losses("given")[0], completion_only_loss=True
    )
    plain = trainer_of(trl.SFTTrainer, tmp_path, "completion_mask", completion_only_loss=True)
    found, expected = trainer.evaluate(), plain.evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    # Not of every release.
    assert found.get("eval_entropy", 0) == pytest.approx(expected.get("eval_entropy", 0), rel=1e-6)


def test_adapters_are_trained(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    trainer = trainer_of(PDLSFTTrainer, tmp_path, None, peft_config=config, pdl_loss=PDLLoss())
    before = weights_of(trainer.model)
    trainer.train()
    moved = [name for name, value in weights_of(trainer.model).items() if not torch.equal(value, before[name])]
    assert moved
    assert all("lora" in name for name in moved)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_type": "dft"}, r"loss_type: got 'dft', expected SFTConfig\(loss_type='nll'\)"),
        ({"compute_loss_func": lambda *_, **__: None}, "compute_loss_func: got one together with pdl_loss"),
        ({"pdl_loss": PDLLoss(reduction="sum")}, "loss: got reduction 'sum'"),
    ],
)
def test_what_excludes_a_pdl_loss_is_refused(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        trainer_of(PDLSFTTrainer, tmp_path, None, **{"pdl_loss": PDLLoss(), **options})


@pytest.mark.skipif(not HAS_A_HEAD_OF_ITS_OWN, reason="TRL before 1.16 calls the model's loss")
def test_an_sft_trainer_that_goes_around_the_loss_is_an_error(tmp_path):
    from pdl_ext.integrations.transformers import PDLCallback

    model, loss_fn = model_of("llama"), PDLLoss()
    apply_pdl_loss(model, loss_fn)
    trainer = trainer_of(trl.SFTTrainer, tmp_path, None, model=model)
    trainer.add_callback(PDLCallback(loss_fn))
    with pytest.raises(RuntimeError, match="PDLLoss: got no call in a training step"):
        trainer.train()
