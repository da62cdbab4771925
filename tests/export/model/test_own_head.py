"""The classifier that a folder was saved with, cut before its last linear layer."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, RobertaConfig
from transformers import RobertaForSequenceClassification as Roberta

from export.model.own_head import OwnHead, UnusableHead, classifier_of

SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


def test_features_times_the_last_layer_are_the_logits() -> None:
    """What is left of the class gives the input of its last layer, from the base model's own outputs."""
    model = Roberta(RobertaConfig(**SIZES, num_labels=3)).eval()
    ids, mask = torch.randint(3, 20, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    expected, outputs = model(ids, mask).logits, model.roberta(ids, mask)
    own = OwnHead(model, causal=False)
    features = own(outputs, mask)
    assert own.classifier == "classifier.out_proj"
    assert not own.pools
    torch.testing.assert_close(own.linear[0](features), expected)
    assert {name for name, _ in own.named_parameters()} == {
        "model.classifier.dense.weight",
        "model.classifier.dense.bias",
    }


def test_bert_uses_the_pooler_of_the_base_model() -> None:
    """BERT's pooler lies in the base model, so nothing frozen is left beside it."""
    own = OwnHead(BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)), causal=False)
    assert (own.classifier, own.pools, list(own.named_parameters())) == ("classifier", True, [])
    assert own.tensors == ("classifier.weight", "classifier.bias")


def test_other_classes_are_not_taken_for_classifiers() -> None:
    """A class without a layer of one output a class, and a configuration that names an unknown class, are told."""
    with pytest.raises(UnusableHead, match="has no linear layer with one output a class"):
        OwnHead(BertForMaskedLM(BertConfig(**SIZES, num_labels=3)), causal=False)
    config = BertConfig(**SIZES)
    config.architectures = ["MyOwnForSequenceClassification"]
    with pytest.raises(UnusableHead, match="has no class MyOwnForSequenceClassification for bert"):
        classifier_of(config)
