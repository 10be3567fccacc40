"""Raw feedback to a published, reference-scored dataset: Apache Beam pipelines and the `una` command."""
