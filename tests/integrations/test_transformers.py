"""PDL as the loss of transformers' models and Trainer: the same numbers as from the logits, without the logits."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pdl_ext
from pdl_ext import PDLLoss, TokenFrequency, functional

tr = pytest.importorskip("transformers", reason="needs pdl_ext[transformers]")

from packaging.version import Version  # noqa: E402  a package that transformers needs

from pdl_ext.integrations import lazy_logits  # noqa: E402  it needs transformers
from pdl_ext.integrations.lazy_logits import LazyLogits  # noqa: E402
from pdl_ext.integrations.transformers import PDLCallback, apply_pdl_loss, remove_pdl_loss  # noqa: E402

V, H, T = 503, 32, 12
SIZES = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ENCODER = {"vocab_size": V, "d_model": H, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BART = {
    "vocab_size": V,
    "d_model": H,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {"ffn_dim": 64, "dropout": 0.0, "word_embed_proj_dim": H}
FALCON = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
# By name: the model's class, its configuration, and whether the loss comes from the hidden states.
FAMILIES = {
    "llama": ("LlamaForCausalLM", GROUPED, True),
    "llama tied": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}, True),
    "mistral": ("MistralForCausalLM", GROUPED, True),
    "qwen2": ("Qwen2ForCausalLM", GROUPED, True),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, True),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": V, "n_embd": H, "n_layer": 2, "n_head": 4, **NO_DROPOUT}, True),
    "gemma2, a softcap": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 8, "final_logit_softcapping": 0.5}, True),
    "cohere, a factor": ("CohereForCausalLM", {**GROUPED, "logit_scale": 0.25}, True),
    "granite, a divisor": ("GraniteForCausalLM", {**GROUPED, "logits_scaling": 3.0}, True),
    "phi, a bias": ("PhiForCausalLM", {**GROUPED, "resid_pdrop": 0.0}, True),
    "gpt-neox": ("GPTNeoXForCausalLM", SIZES, True),
    "opt": ("OPTForCausalLM", {**SIZES, **OPT}, True),
    "bloom": ("BloomForCausalLM", {"vocab_size": V, "hidden_size": H, "n_layer": 2, "n_head": 4}, True),
    "falcon": ("FalconForCausalLM", {**SIZES, **FALCON}, True),
    "mixtral, a router's loss": (
        "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 4, "output_router_logits": True},
        True,
    ),
    "qwen3 of experts": ("Qwen3MoeForCausalLM", {**GROUPED, **EXPERTS, "head_dim": 8}, True),
    "mamba": ("MambaForCausalLM", {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 2, "state_size": 4}, True),
    "t5": ("T5ForConditionalGeneration", {**ENCODER, "decoder_start_token_id": 0}, True),
    "t5 untied": (
        "T5ForConditionalGeneration",
        {**ENCODER, "decoder_start_token_id": 0, "tie_word_embeddings": False},
        True,
    ),
    # It adds a vector to the logits.
    "bart": ("BartForConditionalGeneration", BART, False),
}
IS_OLD = Version(tr.__version__) < Version("5")
NOT_OF_OLD = {
    "mixtral, a router's loss": "generate fails by itself",
    "mamba": "its forward has a loss of its own inside, which is refused",
}


def model_of(name: str, **changes) -> nn.Module:
    kind, settings, _ = FAMILIES[name]
    ending = next(
        ending for ending in ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel") if kind.endswith(ending)
    )
    config = getattr(tr, kind.removesuffix(ending) + "Config")(**{**settings, **changes})
    torch.manual_seed(0)
    model = getattr(tr, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # As initialised all logits are nearly equal, and a lost softcap would not show.
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.train()


def batch(seed: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(rows, T, generator=generator) ** 3 * (V - 3)).long() + 3
    labels = ids.clone()
    labels[:, : T // 3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.fixture
def frequency() -> TokenFrequency:
    counted = TokenFrequency(V)
    for seed in range(20):
        counted.update(batch(seed)["input_ids"])
    return counted


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_loss_and_gradients_of_its_logits(name, frequency):
    if IS_OLD and name in NOT_OF_OLD:
        pytest.skip(f"transformers before 5: {NOT_OF_OLD[name]}")
    model, inputs = model_of(name), batch()
    is_fused = FAMILIES[name][2]
    prompt = inputs["input_ids"][:2, :4]
    before = model.eval().generate(prompt, max_new_tokens=4, do_sample=False)
    model.train()

    # By the definition: the logits of a call without labels.
    unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
    shift = not model.config.is_encoder_decoder
    if not shift:
        unlabelled["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    loss_fn = PDLLoss(frequency, alpha=0.5)
    outputs = model(**unlabelled)
    expected = pdl_ext.reference.pdl_loss(
        outputs.logits, inputs["labels"], PDLLoss(frequency, alpha=0.5).weighting.weights(frequency), shift=shift
    )
    if getattr(model.config, "output_router_logits", False):
        expected = expected + model.config.router_aux_loss_coef * model(**inputs).aux_loss
    expected.backward()
    of_logits = gradients(model)
    model.zero_grad()

    assert apply_pdl_loss(model, loss_fn) is model
    outputs = model(**inputs)
    outputs.loss.backward()
    assert float(outputs.loss) == pytest.approx(float(expected), rel=2e-6)
    check_same(gradients(model), of_logits)
    assert (isinstance(outputs.logits, LazyLogits) and outputs.logits.made is None) == is_fused
    assert torch.equal(model.eval().generate(prompt, max_new_tokens=4, do_sample=False), before)
    # Who reads them gets the model's.
    with torch.no_grad():
        logits = model(**inputs).logits
        assert float((logits + 0 - model(**unlabelled).logits).abs().max()) <= 1e-5 * float(logits.abs().max())


def test_a_model_in_eval_mode_has_the_plain_nll(frequency):
    model, inputs = model_of("gemma2, a softcap").eval(), batch()
    plain = float(model(**inputs).loss)
    apply_pdl_loss(model, PDLLoss(frequency, alpha=1.0, label_smoothing=0.2))
    assert float(model(**inputs).loss) == pytest.approx(plain, rel=1e-6)
    remove_pdl_loss(model)
    loss_fn = PDLLoss(frequency, alpha=1.0)
    apply_pdl_loss(model, loss_fn, eval_loss="pdl")
    weighted = float(model(**inputs).loss)
    assert weighted != pytest.approx(plain, rel=1e-3)
    remove_pdl_loss(model)
    assert float(loss_fn(model(**inputs).logits, inputs["labels"], shift=True)) == pytest.approx(weighted, rel=1e-6)


def test_only_training_is_counted():
    model, loss_fn = model_of("llama"), PDLLoss()
    apply_pdl_loss(model, loss_fn)
    inputs = batch()
    model(**inputs)
    total = loss_fn.frequency.total
    assert total == int((inputs["labels"][:, 1:] != -100).sum())
    model.eval()
    model(**inputs)
    assert loss_fn.frequency.total == total
    assert "pdl" not in " ".join(model.state_dict())


def test_a_model_is_what_it_was_when_the_loss_is_removed(frequency):
    model, inputs = model_of("llama"), batch()
    before = model(**inputs).loss
    attributes = set(vars(model)), set(vars(model.lm_head))
    apply_pdl_loss(model, PDLLoss(frequency))
    assert float(model(**inputs).loss) != float(before)
    assert remove_pdl_loss(model) is model
    assert (set(vars(model)), set(vars(model.lm_head))) == attributes
    assert torch.equal(model(**inputs).loss, before)
    with pytest.raises(ValueError, match="model: got one without a PDLLoss"):
        remove_pdl_loss(model)


def test_copies_and_saved_models_work(frequency, tmp_path):
    model, inputs = model_of("llama"), batch()
    apply_pdl_loss(model, PDLLoss(frequency))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    outputs = copied(**inputs)
    outputs.loss.backward()
    # Of the copy's own head.
    assert copied.lm_head.weight.grad is not None
    assert model.lm_head.weight.grad is None
    assert isinstance(outputs.logits, LazyLogits)
    copied.save_pretrained(tmp_path)
    loaded = tr.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(**inputs).logits, copied(input_ids=inputs["input_ids"]).logits)


@pytest.mark.parametrize("as_dict", [True, False])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_labels_by_position_and_tuples_come_back(name, as_dict, frequency):
    model, inputs = model_of(name), batch()
    apply_pdl_loss(model, PDLLoss(frequency))
    expected = model(**inputs)
    outputs = model(**inputs, return_dict=as_dict)
    assert torch.equal(outputs["loss"] if as_dict else outputs[0], expected.loss)
    assert (outputs["logits"] if as_dict else outputs[1]).shape == expected.logits.shape


@pytest.mark.parametrize("items", [7, torch.tensor(7), torch.tensor([7.0]), torch.tensor([[7], [7]])])
def test_num_items_in_batch_is_the_denominator(items, frequency):
    model, inputs = model_of("llama"), batch()
    apply_pdl_loss(model, PDLLoss(frequency, alpha=0.5))
    weights = pdl_ext.PowerLaw(alpha=0.5).weights(frequency)
    summed = functional.pdl_loss(model(**inputs).logits + 0, inputs["labels"], weights, shift=True, reduction="sum")
    assert float(model(**inputs, num_items_in_batch=items).loss) == pytest.approx(float(summed) / 7, rel=1e-6)


def test_shift_labels_are_taken_as_they_are(frequency):
    model, inputs = model_of("llama"), batch()
    apply_pdl_loss(model, PDLLoss(frequency))
    expected = float(model(**inputs).loss)
    shifted = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    assert float(model(**inputs, shift_labels=shifted).loss) == expected


def test_autocast_is_the_unfused_loss_under_autocast(frequency):
    model, inputs = model_of("llama"), batch()
    with torch.autocast("cpu", torch.bfloat16):
        apply_pdl_loss(model, PDLLoss(frequency), fused=False)
        expected = model(**inputs).loss
        remove_pdl_loss(model)
        apply_pdl_loss(model, PDLLoss(frequency))
        outputs = model(**inputs)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.logits.made is None
    assert float(outputs.loss) == pytest.approx(float(expected), rel=2e-3)


def test_compiled_it_is_one_graph_and_not_fused(frequency):
    model, inputs = model_of("llama"), batch()
    apply_pdl_loss(model, PDLLoss(frequency))
    expected = model(**inputs).loss
    expected.backward()
    of_eager = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        outputs = compiled(**inputs)
        outputs.loss.backward()
    assert type(outputs.logits) is torch.Tensor
    assert float(outputs.loss) == pytest.approx(float(expected), rel=1e-6)
    check_same(gradients(model), of_eager)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and not isinstance(value, LazyLogits):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("fused", [True, False])
def test_no_tensor_of_a_step_is_as_large_as_the_logits(fused):
    vocabulary, rows = 50_257, 2048
    model = model_of("llama", vocab_size=vocabulary, max_position_embeddings=512)
    apply_pdl_loss(model, PDLLoss(vocab_size=vocabulary), fused=fused)
    ids = torch.randint(3, vocabulary, (4, rows // 4))
    with LargestTensor() as largest:
        model(input_ids=ids, labels=ids).loss.backward()
    assert (largest.elements < rows * vocabulary / 2) == fused


PEFT_KINDS = ("lora", "head saved", "tied head saved", "lora of the head")


@pytest.mark.parametrize("order", ["loss first", "peft first"])
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_peft(kind, order, frequency):
    peft = pytest.importorskip("peft", reason="needs peft")
    targets = ["q_proj", "lm_head"] if kind == "lora of the head" else ["q_proj"]
    config = {"target_modules": targets, "init_lora_weights": False}
    if "saved" in kind:
        config["modules_to_save"] = ["lm_head"]

    def adapted(loss_fn, fused):
        model = model_of("llama tied" if "tied" in kind else "llama")
        if order == "loss first":
            apply_pdl_loss(model, loss_fn, fused=fused)
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, peft.LoraConfig(**config))
        if order == "peft first":
            apply_pdl_loss(model, loss_fn, fused=fused)
        outputs = model(**batch())
        outputs.loss.backward()
        return outputs, gradients(model)

    expected, of_logits = adapted(PDLLoss(frequency), False)
    outputs, found = adapted(PDLLoss(frequency), True)
    assert float(outputs.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    check_same(found, of_logits)
    # An adapted head is a sum, which is made.
    made = not isinstance(outputs.logits, LazyLogits) or outputs.logits.made is not None
    assert made == (kind == "lora of the head")


class TestLazyLogits:
    @staticmethod
    def head(bias=True):
        torch.manual_seed(0)
        head = nn.Linear(H, V, bias=bias)
        lazy_logits.record(head)
        hidden = torch.randn(3, H, requires_grad=True)
        with lazy_logits.recording():
            lazy = head(hidden)
        assert isinstance(lazy, LazyLogits)
        return lazy, head(hidden)

    @pytest.mark.parametrize(
        ("operation", "expected"),
        [
            (lambda z: z, (1.0, None, V)),
            (lambda z: z * 0.25, (0.25, None, V)),
            (lambda z: 2 * z.float(), (2.0, None, V)),
            (lambda z: z / 4, (0.25, None, V)),
            (lambda z: torch.tanh(z / 30.0) * 30.0, (1.0, 30.0, V)),
            (lambda z: (z * 0.5 / 30.0).tanh().mul(30.0), (0.5, 30.0, V)),
            (lambda z: torch.tanh(z), (1.0, 1.0, V)),
            (lambda z: z[..., :400].contiguous(), (1.0, None, 400)),
            (lambda z: z.to(torch.float64)[..., :400] * 3, (3.0, None, 400)),
            (lambda z: z.to(z.device).detach(), (1.0, None, V)),
        ],
    )
    def test_what_is_recorded(self, operation, expected):
        lazy, real = self.head()
        result = operation(lazy)
        transform = result.transform()
        assert (transform.logit_scale, transform.softcap, transform.width) == expected
        assert result.made is None
        made = operation(real)
        assert (result.shape, result.dtype, result.device) == (made.shape, made.dtype, made.device)
        assert torch.equal(result.dense(), made)
        weight, bias = lazy.head.weight[: transform.width], lazy.head.bias[: transform.width]
        targets = torch.tensor([5, 300, 7])
        fused = functional.linear_pdl_loss(
            lazy.head.hidden, weight, targets, bias=bias, softcap=transform.softcap, logit_scale=transform.logit_scale
        )
        assert float(fused) == pytest.approx(float(nn.functional.cross_entropy(made.float(), targets)), rel=1e-5)

    @pytest.mark.parametrize(
        "operation",
        [
            lambda z: z + 1.0,
            lambda z: z * torch.ones(V),
            lambda z: z.argmax(-1),
            lambda z: z.softmax(-1),
            lambda z: z[:, :3],
            lambda z: z[..., 3:],
            lambda z: torch.cat([z, z]),
            lambda z: torch.tanh(torch.tanh(z)) * 1.0,
            lambda z: torch.tanh(z) * -3.0,
            lambda z: torch.tanh(z) * 2.0 * 3.0,
            lambda z: z * 0.0,
            lambda z: z.clone().masked_fill_(torch.arange(V) > 400, -5.0),
            lambda z: z.detach().numpy().sum() + z.detach()[0],
        ],
    )
    def test_what_is_not_recorded_makes_the_logits(self, operation):
        lazy, real = self.head()
        result, expected = operation(lazy), operation(real)
        if isinstance(result, LazyLogits):
            assert result.transform() is None
            result = result.dense()
        assert torch.equal(result, expected)
        if expected.requires_grad:
            scores = torch.randn(expected.shape, dtype=expected.dtype)
            (of_lazy,) = torch.autograd.grad(result, lazy.head.hidden, scores)
            (of_real,) = torch.autograd.grad(expected, lazy.head.hidden, scores)
            assert torch.equal(of_lazy, of_real)

    def test_a_head_with_a_forward_of_its_own_is_left_alone(self):
        class Scaled(nn.Linear):
            def forward(self, hidden):
                return super().forward(hidden) * 3

        assert not lazy_logits.record(Scaled(H, V))
        hooked = nn.Linear(H, V)
        hooked.forward = lambda hidden: hidden
        assert not lazy_logits.record(hooked)
        lazy_logits.stop_recording(hooked)
        assert "forward" in vars(hooked)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_a_late_read_gives_what_the_forward_would_have_made(self, mode, autocast):
        head = nn.Linear(H, V)
        lazy_logits.record(head)
        hidden = torch.randn(3, H)
        with mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            real = head(hidden)
            with lazy_logits.recording():
                lazy, tanh = head(hidden), torch.tanh(head(hidden))
        assert lazy.dtype == real.dtype
        assert type(lazy.clone()) is LazyLogits
        late = lazy.clone()[:]
        assert torch.equal(late, real)
        assert (late.dtype, late.requires_grad) == (real.dtype, real.requires_grad)
        assert torch.equal(tanh.dense(), real.tanh())

    def test_a_read_after_the_weight_has_changed_is_an_error(self):
        lazy, _ = self.head()
        detached = lazy.detach()
        with torch.no_grad():
            lazy.head.bias.add_(1.0)
        for late in (lazy, detached):
            with pytest.raises(RuntimeError, match="logits: got a head that was changed since the forward"):
                late.argmax(-1)

    def test_a_write_is_seen_by_the_loss(self):
        lazy, real = self.head(bias=False)
        lazy[:, 5] = -1.0
        assert lazy.transform() is None
        expected = real.clone()
        expected[:, 5] = -1.0
        assert torch.equal(lazy.dense(), expected)

    def test_what_is_saved_is_a_plain_tensor(self, tmp_path):
        lazy, real = self.head()
        torch.save(lazy, tmp_path / "logits.pt")
        loaded = torch.load(tmp_path / "logits.pt", weights_only=True)
        assert type(loaded) is torch.Tensor
        assert torch.equal(loaded, real)

    def test_outside_of_a_labelled_call_the_head_is_itself(self):
        head = nn.Linear(H, V)
        assert lazy_logits.record(head)
        assert type(head(torch.randn(3, H))) is torch.Tensor
        lazy_logits.stop_recording(head)
        assert "forward" not in vars(head)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"model": nn.Linear(2, 2)}, TypeError, "model: got Linear, expected a transformers PreTrainedModel"),
        ({"loss": nn.CrossEntropyLoss()}, TypeError, "loss: got CrossEntropyLoss, expected a PDLLoss"),
        ({"loss": PDLLoss(reduction="sum")}, ValueError, "loss: got reduction 'sum', expected 'mean' or 'token_mean'"),
        ({"loss": PDLLoss(shift=True)}, ValueError, "loss: got shift=True, expected False: the model decides it"),
        ({"loss": PDLLoss(softcap=3.0)}, ValueError, "loss: got softcap=3.0, expected None"),
        (
            {"loss": PDLLoss(vocab_size=7)},
            ValueError,
            f"loss: got counts of 7 tokens, expected {V}, the logits of Llama",
        ),
        ({"eval_loss": "ce"}, ValueError, "eval_loss: got 'ce', expected"),
        ({"fused": 1}, TypeError, "fused: got"),
    ],
)
def test_wrong_arguments_change_nothing(arguments, error, said):
    model = model_of("llama")
    with pytest.raises(error, match=said):
        apply_pdl_loss(**{"model": model, "loss": PDLLoss(), **arguments})
    assert "_loss_function" not in vars(model)
    assert "forward" not in vars(model)


def test_other_wrong_models_are_refused():
    # Its decoder's loss has labels that are not shifted, and does not say so.
    decoder = tr.BartForCausalLM(tr.BartConfig(**BART))
    with pytest.raises(ValueError, match="model: got BartForCausalLM, whose forward does not call loss_function"):
        apply_pdl_loss(decoder, PDLLoss())
    config = tr.LlamaConfig(**GROUPED)
    with pytest.raises(ValueError, match="model: got LlamaModel, expected a model with a language-modelling head"):
        apply_pdl_loss(tr.LlamaModel(config), PDLLoss())
    model = apply_pdl_loss(model_of("llama"), PDLLoss())
    with pytest.raises(ValueError, match="model: got one with a PDLLoss, expected one without"):
        apply_pdl_loss(model, PDLLoss())


def trainer_of(model, folder, *, callbacks=(), examples=16, **arguments):
    pytest.importorskip("accelerate", reason="a Trainer needs it")
    held = batch(3, examples)
    rows = [{key: value[row] for key, value in held.items()} for row in range(examples)]
    settings = {"learning_rate": 1e-3, "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1}
    settings |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 5}
    args = tr.TrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    return tr.Trainer(model, args, train_dataset=rows, eval_dataset=rows[:8], callbacks=list(callbacks))


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


class TestTrainer:
    def test_accumulation_is_one_large_batch(self, frequency, tmp_path):
        found = []
        for size, steps in ((16, 1), (4, 4)):
            model, loss_fn = model_of("llama"), PDLLoss(frequency, alpha=0.5)
            apply_pdl_loss(model, loss_fn)
            trainer = trainer_of(
                model,
                tmp_path,
                callbacks=[PDLCallback(loss_fn)],
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                optim="sgd",
                max_steps=3,
            )
            before = weights_of(model)
            trainer.train()
            found.append({name: value - before[name] for name, value in weights_of(model).items()})
        check_same(found[1], found[0], 2e-4)

    def test_logs_and_evaluation_are_plain(self, frequency, tmp_path):
        model, loss_fn = model_of("llama"), PDLLoss(frequency, alpha=1.0)
        apply_pdl_loss(model, loss_fn)
        trainer = trainer_of(model, tmp_path, callbacks=[PDLCallback(loss_fn)], max_steps=1, learning_rate=0.0)
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        logged = trainer.state.log_history[0]
        taken = next(iter(trainer.get_train_dataloader()))
        remove_pdl_loss(model)
        model.train()
        assert evaluated == pytest.approx(plain_nll(model, trainer.get_eval_dataloader()), rel=1e-5)
        assert logged["pdl/nll"] == pytest.approx(float(model(**taken).loss), rel=1e-5)
        targets = taken["labels"][:, 1:][taken["labels"][:, 1:] != -100]
        weights = loss_fn.weighting.weights(frequency)[targets].double()
        sample = float(weights.sum() ** 2 / (weights**2).sum()) / len(targets)
        assert logged["pdl/effective_sample"] == pytest.approx(sample, rel=1e-5)
        nll = nn.functional.cross_entropy(
            model(**taken).logits[:, :-1].flatten(0, 1), taken["labels"][:, 1:].flatten(), reduction="none"
        )
        nll = nll[taken["labels"][:, 1:].flatten() != -100]
        for number, name in enumerate(("frequent", "medium", "rare")):
            here = frequency.buckets()[targets] == number
            assert logged[f"pdl/nll_{name}"] == pytest.approx(float(nll[here].mean()), rel=1e-5)

    def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(self, tmp_path):
        found = {}
        for part in ("whole", "first", "second"):
            model, loss_fn = model_of("llama"), PDLLoss(alpha=0.5)
            apply_pdl_loss(model, loss_fn)
            folder = tmp_path / ("whole" if part == "whole" else "parts")
            trainer = trainer_of(
                model, folder, callbacks=[PDLCallback(loss_fn)], max_steps=4, save_strategy="steps", save_steps=2
            )
            if part == "first":
                trainer.add_callback(StopAt(2))
            elif part == "second":
                loss_fn.blend = 0.5  # the checkpoint's comes back
            trainer.train(resume_from_checkpoint=part == "second")
            found[part] = weights_of(model), loss_fn.frequency.counts.clone(), loss_fn.blend
        (whole, counts, blend), (resumed, *of_resumed) = found["whole"], found["second"]
        assert torch.equal(of_resumed[0], counts)
        assert of_resumed[1] == blend
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())
        assert int(found["first"][1].sum()) < int(counts.sum())

    def test_a_checkpoint_without_counts_is_refused(self, tmp_path):
        model, loss_fn = model_of("llama"), PDLLoss()
        apply_pdl_loss(model, loss_fn)
        trainer_of(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
        trainer = trainer_of(model, tmp_path, callbacks=[PDLCallback(loss_fn)])
        with pytest.raises(FileNotFoundError, match=r"checkpoint-2/pdl_loss\.pt is missing"):
            trainer.train(resume_from_checkpoint=True)

    def test_a_loss_that_is_not_called_is_an_error(self, frequency, tmp_path):
        model, loss_fn = model_of("llama"), PDLLoss(frequency)
        apply_pdl_loss(model, loss_fn)
        trainer = trainer_of(model, tmp_path, callbacks=[PDLCallback(loss_fn)])
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean()
        with pytest.raises(RuntimeError, match="PDLLoss: got no call in a training step"):
            trainer.train()

    def test_what_goes_around_the_loss_is_refused_at_once(self, frequency, tmp_path):
        model, loss_fn = model_of("llama"), PDLLoss(frequency)
        apply_pdl_loss(model, loss_fn)
        trainer = trainer_of(model, tmp_path, callbacks=[PDLCallback(loss_fn)], label_smoothing_factor=0.1)
        with pytest.raises(ValueError, match=r"label_smoothing_factor: got 0\.1, expected 0"):
            trainer.train()
        trainer = trainer_of(model, tmp_path, callbacks=[PDLCallback(PDLLoss())])
        with pytest.raises(ValueError, match="model: got one without this PDLLoss"):
            trainer.train()
        with pytest.raises(TypeError, match="loss: got Llama"):
            PDLCallback(model)

    def test_a_loss_that_is_set_as_a_submodule_is_found(self, frequency, tmp_path):
        model, loss_fn = model_of("llama"), PDLLoss(frequency)
        plain = float(model(**batch()).loss)
        model.loss_function = loss_fn
        # PyTorch registers a submodule, and transformers never asks for it.
        assert float(model(**batch()).loss) == plain
        trainer = trainer_of(model, tmp_path, callbacks=[PDLCallback(loss_fn)])
        with pytest.raises(ValueError, match="model: got one without this PDLLoss"):
            trainer.train()

    def test_metrics_and_predictions_see_the_logits(self, frequency, tmp_path):
        model, loss_fn = model_of("llama"), PDLLoss(frequency)
        expected = trainer_of(model, tmp_path).predict(trainer_of(model, tmp_path).eval_dataset)
        apply_pdl_loss(model, loss_fn)
        trainer = trainer_of(model, tmp_path)
        trainer.compute_metrics = lambda found: {"shape": list(found.predictions.shape)}
        assert trainer.evaluate()["eval_shape"] == [8, T, V]
        predicted = trainer.predict(trainer.eval_dataset)
        assert torch.allclose(torch.tensor(predicted.predictions), torch.tensor(expected.predictions), atol=1e-5)

    def test_labels_are_counted_as_they_are_trained_on(self, tmp_path):
        model, loss_fn = model_of("llama"), PDLLoss()
        apply_pdl_loss(model, loss_fn)
        trainer = trainer_of(model, tmp_path, callbacks=[PDLCallback(loss_fn)], max_steps=-1, num_train_epochs=1)
        counted = pdl_ext.count_labels(trainer, V, shift=True)
        trainer.train()
        assert torch.equal(counted.counts, loss_fn.frequency.counts)
        assert counted.ignored == loss_fn.frequency.ignored


class StopAt(tr.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


def plain_nll(model, batches) -> float:
    model.eval()
    with torch.no_grad():
        losses = [float(model(**taken).loss) for taken in batches]
    model.train()
    return sum(losses) / len(losses)
