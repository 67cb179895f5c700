"""The verifier as a service: one answer about a secret, for whoever was shown it.

    server       addresses, TLS, the loop                       WHERE it listens
    connection   bytes to requests, with limits and deadlines   WHO may hold what, for how long
    desk         one look for all that was read, else a thread  WHEN an answer is given
    workers      the threads that ask the store, and hash
    routes       a request to a question, a decision to bytes   WHAT is asked and said
    presented    Basic, Bearer, form, JSON                      HOW a secret is shown
    callers      relying parties and what they may ask about    WHO asks
    messages     a request as it was read, an answer as it goes out
    measures     how long answers took
    openapi      the routes, for machines

A decision itself is made in `verifier.decision`, and nowhere else.
"""
