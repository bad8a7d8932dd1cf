"""A PDLLoss's counts, blend and weights survive copying, saving, loading, casting, sharding and wrapping exactly.

Each test runs for four losses: with given counts, online with vocab_size, and online without it, before and after it
has seen logits. Where counts would be lost before, the error has to name what the loss needs.
"""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pdl_ext import PDLLoss, PowerLaw, TokenFrequency, functional

VOCAB, WIDTH = 31, 8
COUNTS = torch.arange(VOCAB) ** 3
OTHER_COUNTS = COUNTS.flip(0).contiguous()
WEIGHTING = PowerLaw(alpha=0.7, fixed={2: 1.5, 5: 0.0})
BLEND = 0.3
TARGETS = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """The loss is a submodule, as in a framework."""

    def __init__(self, loss):
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCAB)
        self.loss = loss

    def forward(self, hidden, targets):
        return self.loss(self.head(hidden).float(), targets)


def new_loss(kind, counts=OTHER_COUNTS):
    """As a program creates it each time that it starts, with nothing learnt."""
    if kind == "given":
        return PDLLoss(counts, weighting=WEIGHTING)
    return PDLLoss(weighting=WEIGHTING, vocab_size=VOCAB if kind == "online with vocab_size" else None)


def seen_loss(kind):
    """With the counts and the blend that must survive."""
    loss = new_loss(kind, COUNTS)
    if kind in ("online", "online with vocab_size"):
        loss(torch.zeros(40, VOCAB), TARGETS)
    loss.blend = BLEND
    return loss


def weights_of(loss):
    """The weights that the loss uses; in eval mode, so that nothing is counted."""
    training = loss.training
    loss.eval()
    _, stats = loss(torch.zeros(VOCAB, VOCAB), torch.arange(VOCAB), return_stats=True)
    loss.train(training)
    return stats.weight


def expected_counts(kind):
    return COUNTS if kind == "given" else torch.bincount(TARGETS, minlength=VOCAB)


def assert_kept(loss, kind):
    weighting = PowerLaw(alpha=0.7, fixed=WEIGHTING.fixed, blend=BLEND)
    assert torch.equal(weights_of(loss), functional.token_weights(expected_counts(kind), weighting))
    assert torch.equal(loss.frequency.counts, expected_counts(kind))
    assert loss.blend == BLEND
    # It can continue: online it counts, given it does not.
    before = loss.frequency.tokens_seen
    loss(torch.zeros(40, VOCAB), TARGETS)
    assert loss.frequency.tokens_seen == before + (0 if kind == "given" else 40)
    # And so do its settings.
    loss.blend = 0.0
    assert torch.equal(weights_of(loss)[6:], torch.ones(VOCAB - 6))


KINDS = ("given", "online", "online with vocab_size")
LIVES = {}


def life(function):
    LIVES[function.__name__.replace("_", " ")] = function
    return function


# Copies.


@life
def deepcopied(kind, folder):
    return copy.deepcopy(seen_loss(kind))


@life
def deepcopied_within_a_model_that_has_trained(kind, folder):
    model = Model(seen_loss(kind))
    weights_of(model.loss)
    return copy.deepcopy(model).loss


@life
def copied(kind, folder):
    return copy.copy(seen_loss(kind))


@life
def pickled(kind, folder):
    loss = seen_loss(kind)
    weights_of(loss)
    return pickle.loads(pickle.dumps(loss))


@life
def saved_whole(kind, folder):
    torch.save(seen_loss(kind), folder / "loss.pt")
    return torch.load(folder / "loss.pt", weights_only=False)


# States.


@life
def state_dict_strict(kind, folder):
    loss = new_loss(kind)
    loss.load_state_dict(seen_loss(kind).state_dict(), strict=True)
    return loss


@life
def state_dict_through_a_file(kind, folder):
    torch.save(Model(seen_loss(kind)).state_dict(), folder / "model.pt")
    model = Model(new_loss(kind))
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return model.loss


@life
def state_dict_assigned(kind, folder):
    loss = new_loss(kind)
    loss.load_state_dict(seen_loss(kind).state_dict(), assign=True)
    return loss


@life
def state_dict_assigned_to_meta(kind, folder):
    loss = new_loss(kind).to("meta")
    loss.load_state_dict(seen_loss(kind).state_dict(), assign=True)
    return loss


@life
def counts_given_on_meta_and_assigned(kind, folder):
    loss = PDLLoss(COUNTS.to("meta"), weighting=WEIGHTING) if kind == "given" else new_loss(kind)
    loss.load_state_dict(seen_loss(kind).state_dict(), assign=True)
    return loss


@life
def state_dict_into_one_that_was_used(kind, folder):
    loss = new_loss(kind)
    loss(torch.zeros(3, VOCAB), torch.tensor([1, 2, 3]))
    loss.load_state_dict(seen_loss(kind).state_dict())
    return loss


@life
def safetensors(kind, folder):
    from safetensors.torch import load_file, save_file

    save_file(seen_loss(kind).state_dict(), folder / "loss.safetensors")
    loss = new_loss(kind)
    loss.load_state_dict(load_file(folder / "loss.safetensors"))
    return loss


@life
def safetensors_of_a_model(kind, folder):
    from safetensors.torch import load_model, save_model

    save_model(Model(seen_loss(kind)), folder / "model.safetensors")
    model = in_place(kind)
    load_model(model, folder / "model.safetensors")
    return model.loss


@life
def to_empty_and_loaded(kind, folder):
    loss = new_loss(kind).to("meta").to_empty(device="cpu")
    loss.load_state_dict(seen_loss(kind).state_dict())
    return loss


@life
def made_under_meta_and_loaded(kind, folder):
    with torch.device("meta"):
        model = Model(new_loss(kind))
    model.to_empty(device="cpu")
    model.load_state_dict(Model(seen_loss(kind)).state_dict())
    return model.loss


# Checkpoints that are loaded in place.


def in_place(kind):
    """A model in the state in which a checkpoint is loaded; without vocab_size it must have seen logits."""
    model = Model(new_loss(kind))
    if kind == "online":
        model.loss(torch.zeros(3, VOCAB), torch.tensor([1, 2, 3]))
    # The weights of the overwritten counts are kept by now.
    weights_of(model.loss)
    return model


@life
def distributed_checkpoint_in_place(kind, folder):
    import torch.distributed.checkpoint as dcp

    dcp.save(Model(seen_loss(kind)).state_dict(), checkpoint_id=folder / "dcp")
    model = in_place(kind)
    dcp.load(model.state_dict(), checkpoint_id=folder / "dcp")
    return model.loss


@life
def distributed_checkpoint_and_load_state_dict(kind, folder):
    import torch.distributed.checkpoint as dcp

    dcp.save(Model(seen_loss(kind)).state_dict(), checkpoint_id=folder / "dcp")
    model = in_place(kind)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder / "dcp")
    model.load_state_dict(state)
    return model.loss


@life
def set_model_state_dict(kind, folder):
    from torch.distributed.checkpoint import state_dict as of_checkpoint

    state = of_checkpoint.get_model_state_dict(Model(seen_loss(kind)))
    model = in_place(kind)
    of_checkpoint.set_model_state_dict(model, state)
    return model.loss


@life
def copied_in_place_by_hand(kind, folder):
    model = in_place(kind)
    for mine, theirs in zip(model.buffers(), Model(seen_loss(kind)).buffers(), strict=True):
        mine.copy_(theirs)
    return model.loss


@life
def copied_in_place_under_inference_mode(kind, folder):
    model = in_place(kind)
    with torch.inference_mode():
        for mine, theirs in zip(model.buffers(), Model(seen_loss(kind)).buffers(), strict=True):
            mine.copy_(theirs)
    return model.loss


# transformers makes a model on meta, loads what the checkpoint has, and leaves memory for the rest.


def pretrained(kind, folder, *, with_loss=True, loss=None):
    """A model class of transformers with the loss in it, and a checkpoint with or without the loss's state."""
    transformers = pytest.importorskip("transformers", reason="needs pdl_ext[demo]")

    class Config(transformers.PretrainedConfig):
        model_type = "pdl-ext-test"

    class Pretrained(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.head = nn.Linear(WIDTH, VOCAB)
            self.loss = (loss or (lambda: new_loss(kind)))()
            self.post_init()

    model = Pretrained(Config())
    if with_loss:
        model.loss = seen_loss(kind)
    else:
        model.loss = nn.Identity()
    model.save_pretrained(folder / "pretrained")
    return Pretrained


@life
def from_pretrained(kind, folder):
    vocab_size = {"online": "online with vocab_size"}.get(kind, kind)
    return (
        pretrained(kind, folder, loss=lambda: new_loss(vocab_size)).from_pretrained(folder / "pretrained").train().loss
    )


@life
def from_pretrained_in_bfloat16(kind, folder):
    vocab_size = {"online": "online with vocab_size"}.get(kind, kind)
    made = pretrained(kind, folder, loss=lambda: new_loss(vocab_size))
    return made.from_pretrained(folder / "pretrained", dtype=torch.bfloat16).train().loss


# Casts.


@life
def half(kind, folder):
    loss = seen_loss(kind).half()
    assert weights_of(loss).dtype == torch.float32
    return loss


@life
def to_bfloat16(kind, folder):
    return Model(seen_loss(kind)).to(torch.bfloat16).loss


@life
def double(kind, folder):
    return seen_loss(kind).double()


@life
def to_cpu_and_float16(kind, folder):
    return seen_loss(kind).to("cpu", torch.float16)


# Averages of a model's weights.


@life
def averaged_model(kind, folder):
    from torch.optim.swa_utils import AveragedModel

    model = Model(seen_loss(kind))
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    return averaged.module.loss


@life
def averaged_model_with_buffers(kind, folder):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = Model(seen_loss(kind))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    # Equal counts have an equal average.
    averaged.update_parameters(model)
    return averaged.module.loss


# Ranks, of which there is one here.


@life
def summed_over_ranks(kind, folder):
    loss = seen_loss(kind)
    loss.frequency.all_reduce()
    loss.frequency.sync()
    return loss


# Wrappers.


def trained(wrapped, model):
    """Two steps without a target that counts, with everything that a wrapper does to buffers in a step."""
    for _ in range(2):
        wrapped(torch.randn(4, WIDTH), torch.full((4,), -100)).backward()
    if not model.loss.online:
        return model.loss
    # They were counted as ignored.
    model.loss.frequency.seen -= 8
    model.loss.frequency.ignored -= 8
    return model.loss


@life
def data_parallel(kind, folder):
    model = Model(seen_loss(kind))
    return trained(nn.DataParallel(model), model)


@life
def replica_of_data_parallel(kind, folder):
    loss = seen_loss(kind)
    weights_of(loss)
    replica = loss._replicate_for_data_parallel()
    # replicate() gives it copies of the buffers; the loss itself must not see those of the replica.
    replica.frequency = loss.frequency._replicate_for_data_parallel()
    replica.frequency._buffers = {name: buffer.clone() for name, buffer in loss.frequency.named_buffers()}
    replica.frequency.counts.copy_(replica.frequency.counts.flip(0))
    weights_of(replica)
    return loss


@life
def distributed_data_parallel(kind, folder):
    model = Model(seen_loss(kind))
    return trained(nn.parallel.DistributedDataParallel(model), model)


@life
def fsdp1_with_buffer_dtype(kind, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    model = Model(seen_loss(kind))
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    wrapped = FullyShardedDataParallel(model, mixed_precision=precision, device_id=torch.device("cpu"))
    return trained(wrapped, model)


@life
def fsdp2(kind, folder):
    from torch.distributed.fsdp import fully_shard

    model = Model(seen_loss(kind))
    return trained(fully_shard(model), model)


@life
def fsdp2_from_meta(kind, folder):
    from torch.distributed.checkpoint import state_dict as of_checkpoint
    from torch.distributed.fsdp import fully_shard

    state = Model(seen_loss(kind)).state_dict()
    with torch.device("meta"):
        model = Model(new_loss(kind))
    fully_shard(model)
    model.to_empty(device="cpu")
    options = of_checkpoint.StateDictOptions(full_state_dict=True)
    of_checkpoint.set_model_state_dict(model, state, options=options)
    return trained(model, model)


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("PyTorch without gloo")
    file = tmp_path_factory.mktemp("rendezvous") / "file"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LIVES)
def test_counts_blend_and_weights_are_kept(name, kind, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*frequency.*")
        assert_kept(LIVES[name](kind, tmp_path), kind)


# Loading in place into an online loss without vocab_size that has seen no logits.


def asks_for_state(folder):
    return Model(new_loss("online")).state_dict()


def asks_for_state_in_full(folder):
    from torch.distributed.checkpoint import state_dict as of_checkpoint

    return of_checkpoint.get_model_state_dict(Model(new_loss("online")))


def loads_safetensors_into_a_model(folder):
    from safetensors.torch import load_model, save_model

    save_model(Model(seen_loss("online")), folder / "model.safetensors")
    load_model(Model(new_loss("online")), folder / "model.safetensors")


def loads_pretrained(folder):
    pretrained("online", folder, loss=lambda: new_loss("online")).from_pretrained(folder / "pretrained")


@pytest.mark.parametrize(
    "loads", [asks_for_state, asks_for_state_in_full, loads_safetensors_into_a_model, loads_pretrained]
)
def test_counts_are_not_left_out_in_silence(loads, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size: got none for loss, .*expected PDLLoss\(vocab_size=\.\.\.\)"):
        loads(tmp_path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss)), nn.DataParallel])
def test_an_online_loss_may_be_copied_before_its_first_logits(copied):
    loss = copied(new_loss("online"))
    loss(torch.zeros(40, VOCAB), TARGETS)
    frequency = getattr(loss, "module", loss).frequency
    assert torch.equal(frequency.counts, expected_counts("online"))


# Uninitialised memory.


@pytest.mark.parametrize("kind", ["given", "given by path", "online with vocab_size"])
def test_counts_that_a_checkpoint_lacks_are_told_of(kind, tmp_path):
    TokenFrequency.from_counts(COUNTS).save(tmp_path / "counts")
    given = {"given": COUNTS, "given by path": tmp_path / "counts"}.get(kind)
    made = pretrained("given", tmp_path, with_loss=False, loss=lambda: PDLLoss(given, vocab_size=VOCAB))
    loss = made.from_pretrained(tmp_path / "pretrained").loss
    # They are the largest integers here. Elsewhere they are more often 0, which an online loss begins with.
    for value in (None, 0) if kind != "online with vocab_size" else (None,):
        if value is not None:
            for buffer in loss.frequency.buffers():
                buffer.fill_(value)
        with pytest.raises(ValueError, match=r"frequency: got .*from_pretrained lose counts that they do not load"):
            weights_of(loss)
    assert loss.blend == 1.0


def test_counts_that_are_not_conserved_are_told_of():
    loss = new_loss("online with vocab_size").to_empty(device="cpu")
    for buffer in loss.frequency.buffers():
        buffer.fill_(7)
    with pytest.warns(UserWarning, match="frequency: got 231 tokens counted, ignored and out of range, expected the 7"):
        weights_of(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Once.
        weights_of(loss)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("value", [0, 2**63 - 1, -1, -100, -(2**63), 4607182418800017408])
def test_a_blend_that_was_lost_is_restored(value, compiled):
    loss = new_loss("given")
    loss.blend = BLEND
    logits, targets = torch.randn(7, VOCAB), torch.arange(7)
    expected = loss(logits, targets)
    loss._blend = torch.full((), value, dtype=torch.int64)
    torch._dynamo.reset()
    called = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    torch.testing.assert_close(called(logits, targets), expected, rtol=1e-6, atol=0)
    assert loss.blend == BLEND


@pytest.mark.parametrize("blend", [0.0, 1.0, 0.5, 0.3, 0.1, 1e-3, 1e-6, 1 / 3])
def test_blends_are_kept_to_the_last_digit_that_counts(blend):
    loss = new_loss("given")
    loss.blend = blend
    other = new_loss("given")
    other.load_state_dict(loss.state_dict())
    assert other.blend == pytest.approx(blend, rel=1e-11, abs=0)


def test_an_average_of_blends_is_their_average():
    from torch.optim.swa_utils import AveragedModel

    model = Model(new_loss("given"))
    averaged = AveragedModel(model, use_buffers=True)
    for blend in (0.0, 0.5, 1.0):
        model.loss.blend = blend
        averaged.update_parameters(model)
    loss = averaged.module.loss
    assert loss.blend == pytest.approx(0.5, rel=1e-6)
    weighting = PowerLaw(alpha=0.7, fixed=WEIGHTING.fixed, blend=0.5)
    torch.testing.assert_close(weights_of(loss), functional.token_weights(OTHER_COUNTS, weighting), rtol=1e-6, atol=0)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blend_that_was_kept_as_a_float_is_read(assign, dtype):
    loss = new_loss("given")
    state = {**loss.state_dict(), "_blend": torch.tensor(0.5, dtype=dtype)}
    loss.load_state_dict(state, assign=assign)
    assert loss.blend == 0.5
    assert loss._blend.dtype == torch.int64
    weights_of(loss)


# Tracers and modes, which have no values, or none that stay valid.


def traced_by_jit(loss, logits, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(loss, (logits, targets))(logits, targets)


def traced_by_make_fx(loss, logits, targets):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(lambda x, y: loss(x, y))(logits, targets)(logits, targets)


def exported(loss, logits, targets):
    return torch.export.export(loss, (logits, targets)).module()(logits, targets)


def under_a_mode(loss, logits, targets):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return loss(logits, targets)


def checkpointed(loss, logits, targets):
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda x: loss(x, targets), logits, use_reentrant=False)


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("trace", [traced_by_jit, traced_by_make_fx, exported, under_a_mode, checkpointed])
def test_tracers_take_a_given_loss(trace, called_before):
    loss = PDLLoss(COUNTS, weighting=WEIGHTING)
    logits, targets = torch.randn(7, VOCAB), torch.arange(7)
    expected = PDLLoss(COUNTS, weighting=WEIGHTING)(logits, targets)
    if called_before:
        loss(logits, targets)
    torch.testing.assert_close(trace(loss, logits, targets), expected, rtol=1e-6, atol=0)
    # And nothing of theirs is kept.
    torch.testing.assert_close(loss(logits, targets), expected, rtol=1e-6, atol=0)
    loss.blend = 0.5
    weighting = PowerLaw(alpha=0.7, fixed=WEIGHTING.fixed, blend=0.5)
    assert torch.equal(weights_of(loss), functional.token_weights(COUNTS, weighting))


@pytest.mark.parametrize("kind", ["given", "online with vocab_size"])
def test_fake_tensors_give_a_fake_loss(kind):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        loss = PDLLoss(torch.ones(VOCAB, dtype=torch.int64)) if kind == "given" else new_loss(kind)
        result = loss(torch.empty(7, VOCAB), torch.zeros(7, dtype=torch.int64))
        assert isinstance(result, FakeTensor)
        assert result.shape == ()


def test_old_counts_are_not_held():
    loss = PDLLoss(COUNTS)
    weights_of(loss)
    before = weakref.ref(loss.frequency.counts)
    loss.to("meta")
    assert before() is None


def test_a_blend_that_was_not_loaded_is_what_it_was():
    loss = new_loss("given")
    loss.blend = BLEND
    loss.to("meta")
    state = {name: value for name, value in seen_loss("given").state_dict().items() if name != "_blend"}
    loss.load_state_dict(state, assign=True, strict=False)
    weighting = PowerLaw(alpha=0.7, fixed=WEIGHTING.fixed, blend=BLEND)
    assert torch.equal(weights_of(loss), functional.token_weights(COUNTS, weighting))


def test_a_compiled_loss_is_checked():
    loss = PDLLoss(COUNTS)
    loss.to_empty(device="cpu")
    for buffer in loss.frequency.buffers():
        buffer.zero_()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="frequency: got no token, expected those given to the loss"):
        torch.compile(loss, backend="eager", fullgraph=True)(torch.zeros(3, VOCAB), torch.tensor([1, 2, 3]))


# Writes that are detected, and writes that are not.


def write_counts(loss):
    loss.frequency.counts.copy_(OTHER_COUNTS)


def assign_counts(loss):
    loss.frequency.counts = OTHER_COUNTS.clone()


def replace_frequency(loss):
    loss.frequency = TokenFrequency.from_counts(OTHER_COUNTS)


def update_frequency(loss):
    loss.frequency.update(torch.full((1000,), 3))


def merge_frequency(loss):
    loss.frequency.merge(TokenFrequency.from_counts(OTHER_COUNTS))


def replace_weighting(loss):
    loss.weighting = PowerLaw(alpha=1.5, fixed={7: 3.0})


def set_blend(loss):
    loss.blend = 0.5


WRITES = [
    write_counts,
    assign_counts,
    replace_frequency,
    update_frequency,
    merge_frequency,
    replace_weighting,
    set_blend,
]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_writes_are_noticed(write, inference):
    loss = PDLLoss(COUNTS, weighting=WEIGHTING)
    before = weights_of(loss)
    with torch.inference_mode(inference):
        write(loss)
        weights = weights_of(loss).clone()
    blend = {"blend": 0.5} if write is set_blend else {}
    expected = functional.token_weights(
        loss.frequency.counts,
        PowerLaw(alpha=loss.weighting.alpha, fixed=loss.weighting.fixed, **blend),
    )
    assert torch.equal(weights, expected)
    assert torch.equal(weights_of(loss), expected)
    assert not torch.equal(expected, before)


@pytest.mark.parametrize("write", WRITES)
def test_writes_are_noticed_by_compiled_losses(write):
    loss = PDLLoss(COUNTS, weighting=WEIGHTING)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    logits, targets = torch.randn(6, VOCAB), torch.arange(6)
    compiled(logits, targets)
    write(loss)
    torch.testing.assert_close(compiled(logits, targets), loss(logits, targets), rtol=1e-6, atol=0)


def test_weights_are_computed_once(monkeypatch):
    calls = []
    compute = PowerLaw.table

    def counted(*arguments):
        calls.append(arguments)
        return compute(*arguments)

    monkeypatch.setattr(PowerLaw, "table", counted)
    loss = PDLLoss(COUNTS, weighting=WEIGHTING)
    for _ in range(3):
        weights_of(loss)
        with torch.inference_mode():
            weights_of(loss)
    assert len(calls) == 1
    loss.blend = 0.5
    weights_of(loss)
    assert len(calls) == 2


def test_new_weights_lie_where_the_old_ones_did():
    """A captured CUDA graph reads them there."""
    loss = PDLLoss(COUNTS, weighting=WEIGHTING)
    where = loss._weights.kept(loss.frequency.counts, loss._blend, loss.weighting).data_ptr()
    for write in (write_counts, update_frequency, set_blend):
        write(loss)
        loss.refresh()
        assert loss._weights.kept(loss.frequency.counts, loss._blend, loss.weighting).data_ptr() == where


def write_by_data(loss):
    loss.frequency.counts.data.copy_(OTHER_COUNTS)


def write_by_numpy(loss):
    loss.frequency.counts.numpy()[:] = OTHER_COUNTS.numpy()


@pytest.mark.parametrize("write", [write_by_data, write_by_numpy])
def test_writes_that_pytorch_does_not_see_need_refresh(write):
    loss = PDLLoss(COUNTS, weighting=WEIGHTING)
    before = weights_of(loss)
    write(loss)
    assert torch.equal(weights_of(loss), before)
    loss.refresh()
    assert torch.equal(weights_of(loss), functional.token_weights(OTHER_COUNTS, WEIGHTING))


@pytest.mark.parametrize("kind", ["given", "online with vocab_size"])
def test_a_loss_made_under_inference_mode_notices_everything_there(kind):
    with torch.inference_mode():
        loss = new_loss(kind, COUNTS)
        weights_of(loss)
        loss.frequency.counts.copy_(OTHER_COUNTS)
        assert torch.equal(weights_of(loss), functional.token_weights(OTHER_COUNTS, WEIGHTING))
