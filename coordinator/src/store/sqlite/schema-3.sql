-- Version 3: a transaction and its branches are one row. A branch has a row in `branch` only if there is more to tell of it than its
-- registration: a payload, failed attempts, an acknowledgement while others are open, an answer of an operator. Rows of earlier
-- versions stay as they are.

-- The same columns under other names, so that a program of an earlier version can neither take over, write nor delete: it would not
-- look for branches in the transaction's row.
ALTER TABLE partition RENAME COLUMN batches TO latest_batch;
ALTER TABLE epoch RENAME COLUMN purges TO purge_steps;

-- How many branches it has; NULL: recorded by version 1.
ALTER TABLE global_transaction RENAME COLUMN branches TO branch_count;
-- Its branches in order of registration, JSON: id, kind (if it is not tcc), action, participant, target, and whether it has a payload
-- in `branch`. NULL: recorded by an earlier version, and all of them are rows of `branch`.
ALTER TABLE global_transaction ADD COLUMN branches TEXT;

DROP VIEW readable_transaction;
DROP VIEW readable_branch;

-- A list of zeros stands for the branches of a transaction of an earlier version: they are all in `branch`.
CREATE VIEW readable_transaction AS
SELECT t.text AS xid, g.name,
       CASE g.state WHEN 1 THEN 'trying' WHEN 2 THEN 'confirming' WHEN 3 THEN 'cancelling' WHEN 4 THEN 'confirmed'
                    WHEN 5 THEN 'cancelled' END AS state,
       CASE WHEN g.state IN (2, 3) THEN (SELECT group_concat(participant, ', ') FROM
            (SELECT coalesce(b.participant, json_extract(j.value, '$.participant')) AS participant
             FROM json_each(CASE WHEN g.branches IS NULL THEN '[' || replace(hex(zeroblob(63)), '00', '0,') || '0]'
                                 WHEN json_valid(g.branches) THEN g.branches ELSE '[]' END) AS j
             LEFT JOIN branch AS b ON b.xid = g.xid AND b.position = j.key
             WHERE b.state IS NULL OR b.state = 1 ORDER BY j.key)) END AS waiting_for,
       strftime('%Y-%m-%d %H:%M:%f', g.begun_at / 1000.0, 'unixepoch') AS begun_at,
       strftime('%Y-%m-%d %H:%M:%f', g.decided_at / 1000.0, 'unixepoch') AS decided_at,
       strftime('%Y-%m-%d %H:%M:%f', g.finished_at / 1000.0, 'unixepoch') AS finished_at,
       strftime('%Y-%m-%d %H:%M:%f', g.due_at / 1000.0, 'unixepoch') AS due_at,
       CASE g.cancel_cause WHEN 1 THEN 'requested' WHEN 2 THEN 'refused' WHEN 3 THEN 'timed out' WHEN 4 THEN 'a try unknown'
                           WHEN 5 THEN 'coordinator restarted' END AS cancel_cause,
       coalesce(g.cancel_reason, g.refusal) AS cancel_reason,
       g.labels
FROM global_transaction AS g JOIN xid_text AS t ON t.xid = g.xid;

CREATE VIEW readable_branch AS
SELECT t.text AS xid,
       coalesce(b.branch_id, json_extract(j.value, '$.id')) AS branch_id,
       coalesce(b.action, json_extract(j.value, '$.action')) AS action,
       coalesce(b.participant, json_extract(j.value, '$.participant')) AS participant,
       coalesce(b.target, json_extract(j.value, '$.target')) AS target,
       CASE WHEN b.state = 3 THEN 'resolved' WHEN g.state = 4 OR (g.state = 2 AND b.state = 2) THEN 'confirmed'
            WHEN g.state = 5 OR (g.state = 3 AND b.state = 2) THEN 'cancelled' ELSE 'registered' END AS state,
       coalesce(b.attempts, 0) AS attempts, coalesce(b.needs_attention, 0) AS needs_attention,
       strftime('%Y-%m-%d %H:%M:%f', b.due_at / 1000.0, 'unixepoch') AS due_at, b.error_code, b.error_message
FROM global_transaction AS g
JOIN json_each(CASE WHEN g.branches IS NULL THEN '[' || replace(hex(zeroblob(63)), '00', '0,') || '0]'
                    WHEN json_valid(g.branches) THEN g.branches ELSE '[]' END) AS j
LEFT JOIN branch AS b ON b.xid = g.xid AND b.position = j.key
JOIN xid_text AS t ON t.xid = g.xid
WHERE b.xid IS NOT NULL OR json_extract(j.value, '$.id') IS NOT NULL;
