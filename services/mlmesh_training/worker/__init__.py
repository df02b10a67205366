"""The process of a job on another machine: fetches the task, trains it, reports back."""
