"""Is a run healthy? Its record, a verdict in plain words, a terminal view, a page, a probe."""
