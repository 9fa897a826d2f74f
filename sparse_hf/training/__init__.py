"""When things happen inside a `transformers.Trainer`."""
