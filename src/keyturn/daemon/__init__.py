"""WHO runs it: the daemon, and the commands that do its work while it is down.

The daemon     service (starts, leads, dispatches, reloads, stops), signals, supervision, readiness,
               watching with metrics, logs with masking, cron, filewatch
Its jobs       a rotation is `keyturn.rotation`, called by service; revoking, anchoring, notifying,
               own_logins
Admin socket   door (the path), peer (who asks), wire (the lines), socket (the server), commands with
               answers, rehearsal, report and names
HTTP           listener with certificates, pages; front opens both ways to ask
A restore      keeping (`keyturn store upgrade|backup|restore`) around recovery, which a daemon's start
               goes through too; the rows are `storage.restoring` and `storage.merge`
No daemon      offline (revoke and such on the bare store), checking (are the files valid), checks and
               own_checks (`keyturn check --probe`)
"""
