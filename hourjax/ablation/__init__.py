"""The paper's ablations, trained and evaluated on data of one's own."""
