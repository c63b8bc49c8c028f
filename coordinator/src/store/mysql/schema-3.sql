-- Version 3: a transaction and its branches are one row. A branch has a row in `branch` only if there is more to tell of it than its
-- registration. Rows of earlier versions stay as they are. A step may be run again, so each change is made only if it is still needed.

-- A coordinator of an earlier version that still runs, or waits as a standby, can neither take over, write nor delete from here on:
-- each of its statements names the column `position`, `batches` or `purges`. It would not look for branches in the transaction's row.
SET @alter = (SELECT IF(COUNT(*) = 0, 'DO 0',
    'ALTER TABLE `partition` CHANGE COLUMN batches latest_batch BIGINT NOT NULL COMMENT ''number of the latest batch of this epoch; each batch moves it by one''')
    FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = 'partition' AND column_name = 'batches');
PREPARE alter_table FROM @alter;
EXECUTE alter_table;

SET @alter = (SELECT IF(COUNT(*) = 0, 'DO 0',
    'ALTER TABLE epoch CHANGE COLUMN purges purge_steps BIGINT NOT NULL DEFAULT 0 COMMENT ''steps of the purge under this epoch; each step counts, so that a takeover and a step of an earlier owner cannot both commit''')
    FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = 'epoch' AND column_name = 'purges');
PREPARE alter_table FROM @alter;
EXECUTE alter_table;

SET @alter = (SELECT IF(COUNT(*) > 0, 'DO 0',
    'ALTER TABLE global_transaction CHANGE COLUMN branches branch_count SMALLINT COMMENT ''how many branches it has; NULL: recorded by version 1''')
    FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = 'global_transaction' AND column_name = 'branch_count');
PREPARE alter_table FROM @alter;
EXECUTE alter_table;

SET @alter = (SELECT IF(COUNT(*) > 0, 'DO 0',
    'ALTER TABLE global_transaction ADD COLUMN branches MEDIUMTEXT COMMENT ''its branches in order of registration, JSON: id, kind (if it is not tcc), action, participant, target, and whether it has a payload in `branch`. NULL: recorded by an earlier version, and all of them are rows of `branch`''')
    FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = 'global_transaction' AND column_name = 'branches');
PREPARE alter_table FROM @alter;
EXECUTE alter_table;
DEALLOCATE PREPARE alter_table;

ALTER TABLE branch COMMENT = 'what is to be told of a branch beyond its registration: a payload, failed attempts, an acknowledgement while others are open, an answer of an operator';

-- A list of numbers stands for the branches of a transaction of an earlier version: they are all in `branch`.
CREATE OR REPLACE VIEW readable_branch AS
SELECT CONCAT(CONV(HEX(SUBSTR(g.xid, 1, 2)), 16, 10), '-', CONV(HEX(SUBSTR(g.xid, 3, 4)), 16, 10), '-',
              CONV(HEX(SUBSTR(g.xid, 7, 6)), 16, 10), '-', LOWER(HEX(SUBSTR(g.xid, 13, 4)))) AS xid,
       COALESCE(b.branch_id, j.branch_id) AS branch_id, COALESCE(b.action, j.action) AS action,
       COALESCE(b.participant, j.participant) AS participant, COALESCE(b.target, j.target) AS target,
       CASE WHEN b.state = 3 THEN 'resolved' WHEN g.state = 4 OR (g.state = 2 AND b.state = 2) THEN 'confirmed'
            WHEN g.state = 5 OR (g.state = 3 AND b.state = 2) THEN 'cancelled' ELSE 'registered' END AS state,
       COALESCE(b.attempts, 0) AS attempts, COALESCE(b.needs_attention, 0) AS needs_attention,
       TIMESTAMP('1970-01-01') + INTERVAL b.due_at * 1000 MICROSECOND AS due_at, b.error_code, b.error_message
FROM global_transaction AS g
JOIN JSON_TABLE(CASE WHEN g.branches IS NULL THEN CONCAT('[', REPEAT('0,', 63), '0]') WHEN JSON_VALID(g.branches) THEN g.branches ELSE '[]' END,
    '$[*]' COLUMNS (place FOR ORDINALITY, branch_id VARCHAR(32) PATH '$.id', action VARCHAR(128) PATH '$.action',
                    participant VARCHAR(64) PATH '$.participant', target VARCHAR(256) PATH '$.target')) AS j
LEFT JOIN branch AS b ON b.xid = g.xid AND b.position = j.place - 1
WHERE b.xid IS NOT NULL OR j.branch_id IS NOT NULL;

CREATE OR REPLACE VIEW readable_transaction AS
SELECT CONCAT(CONV(HEX(SUBSTR(g.xid, 1, 2)), 16, 10), '-', CONV(HEX(SUBSTR(g.xid, 3, 4)), 16, 10), '-',
              CONV(HEX(SUBSTR(g.xid, 7, 6)), 16, 10), '-', LOWER(HEX(SUBSTR(g.xid, 13, 4)))) AS xid,
       g.name,
       CASE g.state WHEN 1 THEN 'trying' WHEN 2 THEN 'confirming' WHEN 3 THEN 'cancelling' WHEN 4 THEN 'confirmed'
                    WHEN 5 THEN 'cancelled' END AS state,
       CASE WHEN g.state IN (2, 3) THEN
           (SELECT GROUP_CONCAT(COALESCE(b.participant, j.participant) ORDER BY j.place SEPARATOR ', ')
            FROM JSON_TABLE(CASE WHEN g.branches IS NULL THEN CONCAT('[', REPEAT('0,', 63), '0]') WHEN JSON_VALID(g.branches) THEN g.branches ELSE '[]' END,
                '$[*]' COLUMNS (place FOR ORDINALITY, participant VARCHAR(64) PATH '$.participant')) AS j
            LEFT JOIN branch AS b ON b.xid = g.xid AND b.position = j.place - 1 WHERE b.state IS NULL OR b.state = 1)
       END AS waiting_for,
       TIMESTAMP('1970-01-01') + INTERVAL g.begun_at * 1000 MICROSECOND AS begun_at,
       TIMESTAMP('1970-01-01') + INTERVAL g.decided_at * 1000 MICROSECOND AS decided_at,
       TIMESTAMP('1970-01-01') + INTERVAL g.finished_at * 1000 MICROSECOND AS finished_at,
       TIMESTAMP('1970-01-01') + INTERVAL g.due_at * 1000 MICROSECOND AS due_at,
       CASE g.cancel_cause WHEN 1 THEN 'requested' WHEN 2 THEN 'refused' WHEN 3 THEN 'timed out' WHEN 4 THEN 'a try unknown'
                           WHEN 5 THEN 'coordinator restarted' END AS cancel_cause,
       COALESCE(g.cancel_reason, g.refusal) AS cancel_reason,
       g.labels
FROM global_transaction AS g;
