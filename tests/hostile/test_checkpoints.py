"""Malformed and hostile checkpoints. HOSTILE_SEED and HOSTILE_CASES ask for others, and for more of them."""

import pytest

from hostile import config_files, files_beside, weight_files
from hostile.harness import failures
from hostile.seeds import number, seed


@pytest.mark.parametrize("generator, usual", [(config_files, 130), (weight_files, 80), (files_beside, 40)])
def test_each_ends_in_one_sentence_or_in_what_is_right(generator, usual, tmp_path):
    found = failures(generator.generate(seed(), number(usual)), tmp_path)
    assert not found, "\n".join(found)
