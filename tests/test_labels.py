"""count_labels: what a training loop will learn."""

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
        (BATCHES, {"key": "targets"}, ValueError, r"key: got 'targets', expected one of a batch's keys \['labels'\]"),
        ([{"labels": torch.tensor(1)}], {}, ValueError, r"batches: got 'labels' of shape \[\]"),
        ([{"labels": torch.tensor([1, 9])}], {}, IndexError, "9"),
    ],
)
def test_wrong_input_is_named(batches, options, error, said):
    with pytest.raises(error, match=said):
        pdl_ext.count_labels(batches, 5, **{"shift": True, **options})
