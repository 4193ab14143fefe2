"""Tables, figures, sentences and one HTML page from a run's results. Takes plain values; touches no files, no torch."""
