"""What the paper found: the numbers of its tables 1 to 4.

Source: Yadav et al., "What Matters for Model Merging at Scale?", appendix C. The models are PaLM-2
("pretrained") and PaLM-2-IT ("instruct"); means over three seeds, to two decimals. Where the
paper's text and its tables disagree, the tables stand here: section 4.4 gives the fall from 0.66 to
0.39 and the one from 0.91 to 0.86 to 8B models, tables 3 and 1 give both to 1B ones.
"""

from pathlib import Path

import numpy as np
import pandas as pd


def merging_at_scale() -> pd.DataFrame:
    """The paper's tables 1 to 4, as the results of our own studies are laid out.

    Returns:
        A row for each size ("1B" to "64B", in order), base, method and number of experts: size,
        base, method, experts, held_in, held_in_low, held_in_high, held_out, held_out_low,
        held_out_high. Normalised performance (1 = the task's expert, or the base model); the paper
        gives no bands, so low and high are NaN.
    """
    frame = pd.read_csv(Path(__file__).parent / "merging_at_scale.csv")
    for column in ("held_in", "held_out"):
        place = frame.columns.get_loc(column) + 1
        for end in ("high", "low"):
            frame.insert(place, f"{column}_{end}", np.nan)
    return frame
