"""count_labels: the labels that a training loop will learn."""

from collections import UserDict

import pytest
import torch

import pdl_ext

BATCHES = [{"labels": torch.tensor([[3, 1, -100, 1], [2, 0, 1, -100]])}, {"labels": [[4, 4, -100, -100]]}]


@pytest.mark.parametrize(("shift", "counts", "ignored"), [(True, [1, 3, 0, 0, 1], 4), (False, [1, 3, 1, 1, 2], 4)])
def test_each_batch_is_counted_once(shift, counts, ignored):
    frequency = pdl_ext.count_labels(iter(BATCHES), 5, shift=shift)
    assert frequency.counts.tolist() == counts
    assert int(frequency.ignored) == ignored


def test_an_online_loss_counts_the_same():
    loss_fn = pdl_ext.PDLLoss(vocab_size=5, shift=True)
    for batch in BATCHES:
        labels = torch.as_tensor(batch["labels"])
        loss_fn(torch.zeros(*labels.shape, 5), labels)
    assert torch.equal(loss_fn.frequency.counts, pdl_ext.count_labels(BATCHES, 5, shift=True).counts)


def test_another_key_and_what_has_a_loader():
    class Trainer:
        def get_train_dataloader(self):
            return [{"targets": torch.tensor([1, 1, 2])}]

    assert pdl_ext.count_labels(Trainer(), 3, shift=False, key="targets").counts.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("batches", "options", "error", "said"),
    [
        (BATCHES, {"shift": 1}, TypeError, "shift: got"),
        (BATCHES[0], {}, TypeError, "batches: got dict, expected an iterable of batches"),
        (7, {}, TypeError, "batches: got int"),
        ([torch.tensor([1])], {}, TypeError, "batches: got a batch that is a Tensor, expected mappings with 'labels'"),
        ([(1, 2)], {}, TypeError, r"batch that is a tuple, expected mappings with 'labels' \(a position as key is for"),
        ([(1, 2)], {"key": 2}, ValueError, "key: got 2, expected a position in a batch of 2 entries"),
        (BATCHES, {"key": 1}, TypeError, "batches: got a batch that is a dict, expected tuples for key=1"),
        (BATCHES, {"key": True}, TypeError, "key: got True, expected the name of the labels, or their position"),
        (BATCHES, {"key": "targets"}, ValueError, r"key: got 'targets', expected one of a batch's keys \['labels'\]"),
        ([{"labels": torch.tensor(1)}], {}, ValueError, r"batches: got 'labels' of shape \[\]"),
        ([{"labels": torch.tensor([1, 9])}], {}, IndexError, "9"),
    ],
)
def test_wrong_input_is_named(batches, options, error, said):
    with pytest.raises(error, match=said):
        pdl_ext.count_labels(batches, 5, **{"shift": True, **options})


ROWS = [[3, 1, 2], [4], [], [0, -100, 4, 4]]
COLLATED = torch.tensor([row + [-100] * (4 - len(row)) for row in ROWS])


class Encoding(UserDict):
    """Like transformers' BatchEncoding, a mapping whose iteration is different."""

    def __iter__(self):
        return iter(self.data["labels"])


def loaders():
    """The sources of batches in training loops, each with count_labels' arguments for the labels."""
    rows = [{"labels": COLLATED[row], "input_ids": COLLATED[row]} for row in range(4)]
    pairs = torch.utils.data.TensorDataset(COLLATED, COLLATED)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    return {
        "DataLoader": (torch.utils.data.DataLoader(rows, batch_size=3), "labels"),
        "workers": (torch.utils.data.DataLoader(rows, batch_size=2, num_workers=1), "labels"),
        "DataLoader of a stream": (torch.utils.data.DataLoader(Stream(), batch_size=3), "labels"),
        "DataLoader of pairs": (torch.utils.data.DataLoader(pairs, batch_size=2), 1),
        "the last of a tuple": (torch.utils.data.DataLoader(pairs, batch_size=2), -1),
        "rows": (rows, "labels"),
        "generator": (({"labels": row.numpy()} for row in COLLATED), "labels"),
        "BatchEncoding": ([Encoding(labels=COLLATED)], "labels"),
        "lists of any length": ([{"labels": ROWS[:3]}, {"labels": ROWS[3:]}], "labels"),
        "tensors of any length": ([{"labels": [torch.tensor(row) for row in ROWS if row]}], "labels"),
        "int16": ([{"labels": COLLATED.to(torch.int16)}], "labels"),
    }


@pytest.mark.parametrize("name", list(loaders()))
def test_any_loader(name):
    batches, key = loaders()[name]
    frequency = pdl_ext.count_labels(batches, 5, shift=True, key=key)
    assert frequency.counts.tolist() == [0, 1, 1, 0, 2]


def test_datasets_as_loaders():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'pdl_ext[trl]'")
    dataset = datasets.Dataset.from_dict({"labels": ROWS})
    for batches in (dataset, dataset.iter(2), dataset.to_iterable_dataset(), dataset.with_format("torch")):
        assert pdl_ext.count_labels(batches, 5, shift=True).counts.tolist() == [0, 1, 1, 0, 2]


def test_counts_may_lie_elsewhere_than_labels(monkeypatch):
    """As with a card as the default device, or a loader's labels on one."""
    moved = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kw: moved.append(args) or to(self, *args, **kw))
    pdl_ext.count_labels([{"labels": COLLATED}], 5, shift=True)
    assert (torch.device("cpu"),) in moved
