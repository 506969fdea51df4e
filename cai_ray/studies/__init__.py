"""Questions about a constitution or a run that take a study to answer."""
