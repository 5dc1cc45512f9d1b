"""Videos to feature files: decoding beside encoding, workers, Beam."""
