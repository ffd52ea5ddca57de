"""What an unlearned model still knows of the forgotten class, held against models retrained without it.

Each audit is one file: plain functions on tensors or on a model, and ``AUDIT``, which measures with them. ``table.py``
lists the audits, ``audit.py`` does them all on each model and fixes the bands first, ``verdict.py`` judges.

To add an audit, write such a file and add its ``AUDIT`` to the table; its figures then have bands, a part in the
verdict and a row in the report::

    def _measure(subject: Subject, images: AuditImages, seen: View, references: Sequence[View]) -> Found:
        of_class = torch.isin(images.test.labels, torch.tensor(images.forget))
        sure = seen.test.logits[of_class].softmax(1).amax(1)
        return Found({"confidence": Figure(float(sure.mean()))})


    AUDIT = Audit("confidence", {"confidence": FigureKind("confidence", "How sure is the model?", "apart")}, _measure)
"""
