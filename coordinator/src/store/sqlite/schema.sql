-- The embedded store, version 1. Times are UTC milliseconds since 1970. Ids are binary and of fixed width; the views
-- at the end show them as people write them. Only the coordinator writes here.

CREATE TABLE partition (
    partition INTEGER PRIMARY KEY,  -- 0 to 15: the slice of all xids; fixed when the store is made
    epoch     INTEGER NOT NULL,     -- grows by one with each owner
    position  INTEGER NOT NULL,     -- number of the epoch's latest batch; each batch moves it by one
    owner     TEXT                  -- the process that owns it, for people; NULL: handed back at an orderly end
) WITHOUT ROWID;

CREATE TABLE epoch (
    partition INTEGER NOT NULL,     -- whose
    epoch     INTEGER NOT NULL,     -- which
    nonce     INTEGER NOT NULL,     -- 32 random bits, part of every xid of this epoch
    owner     TEXT NOT NULL,        -- the process that took it over, for people
    taken_at  INTEGER NOT NULL,     -- when
    PRIMARY KEY (partition, epoch)
) WITHOUT ROWID;

CREATE TABLE global_transaction (
    xid              BLOB PRIMARY KEY,  -- 16 bytes: partition (2), epoch (4), sequence (6), nonce (4), big-endian
    name             TEXT NOT NULL,     -- what kind of operation, as its initiator calls it
    drive            INTEGER NOT NULL,  -- who calls the Trys: 1 the initiator, 2 the coordinator at once, 3 in order
    state            INTEGER NOT NULL,  -- 1 trying, 2 confirming, 3 cancelling, 4 confirmed, 5 cancelled
    labels           TEXT NOT NULL,     -- JSON object of strings, from the initiator
    begun_at         INTEGER NOT NULL,  -- when the coordinator took it in
    expires_at       INTEGER NOT NULL,  -- end of phase one
    decided_at       INTEGER,           -- NULL while trying
    finished_at      INTEGER,           -- NULL until every branch has acknowledged
    due_at           INTEGER,           -- when somebody must look at it if nobody works on it; NULL when it is final
    cancel_cause     INTEGER,           -- 1 requested, 2 refused, 3 timed out, 4 a Try unknown, 5 coordinator restarted
    cancel_branch_id TEXT,              -- causes 2 and 4: whose Try
    cancel_reason    TEXT,              -- causes 1 and 4: in words
    refusal          TEXT,              -- cause 2: the participant's refusal, JSON
    key_hash         BLOB               -- SHA-256 of the idempotency key; NULL: it has none
) WITHOUT ROWID;

CREATE INDEX global_transaction_due ON global_transaction (due_at) WHERE due_at IS NOT NULL;

CREATE TABLE branch (
    xid             BLOB NOT NULL,      -- whose
    position        INTEGER NOT NULL,   -- 0, 1, …: order of registration
    branch_id       TEXT NOT NULL,      -- its name within the transaction
    action          TEXT NOT NULL,      -- which of the participant's actions
    participant     TEXT NOT NULL,      -- whose; the configuration may know its address
    target          TEXT NOT NULL,      -- address that the branch brought; '': none
    payload         BLOB,               -- only if the coordinator was asked to carry it
    payload_type    TEXT,               -- content type of the payload
    state           INTEGER NOT NULL,   -- 1 open, 2 acknowledged, 3 resolved by an operator. All rows of a transaction that
                                        -- finished without a failed attempt stay 1: its own state tells the rest
    attempts        INTEGER NOT NULL,   -- calls of phase two, as of the latest failed one
    needs_attention INTEGER NOT NULL,   -- 1: the participant has asked for a person
    due_at          INTEGER,            -- after a failed attempt: when the next one is due
    error_code      TEXT,               -- of the latest failed attempt: gRPC code
    error_message   TEXT,               -- of the same attempt, in words
    error_at        INTEGER,            -- when it was noticed
    PRIMARY KEY (xid, position)
) WITHOUT ROWID;

CREATE TABLE idempotency (
    key_hash BLOB PRIMARY KEY,          -- SHA-256 of the key
    xid      BLOB NOT NULL,             -- the transaction that it gave
    key_digest BLOB NOT NULL            -- SHA-256 of what must be the same in a repeat
) WITHOUT ROWID;

-- What operators answered for participants. Kept for ever, also when the transaction itself is deleted.
CREATE TABLE resolution (
    xid       BLOB NOT NULL,            -- of which transaction
    branch_id TEXT NOT NULL,            -- for which of its branches
    decision  INTEGER NOT NULL,         -- 1 confirm, 2 cancel: what the participant should have done
    name      TEXT NOT NULL,            -- of the transaction
    action    TEXT NOT NULL,            -- of the branch
    operator  TEXT NOT NULL,            -- who answered
    reason    TEXT NOT NULL,            -- why, and what was done instead
    at        INTEGER NOT NULL,         -- when
    PRIMARY KEY (xid, branch_id)
) WITHOUT ROWID;

CREATE TABLE purged (
    partition INTEGER PRIMARY KEY,      -- of which partition
    through   BLOB NOT NULL             -- the largest xid that was ever deleted after its retention
) WITHOUT ROWID;

-- SQLite 3.40 has no function that reads a number from a blob, so this adds up hexadecimal digits. The subqueries run only for the
-- rows that a query returns: a view that is computed for the whole table takes minutes with a week of transactions.
CREATE VIEW xid_text AS
SELECT xid,
       (WITH RECURSIVE digit(n, value) AS (
            VALUES (1, 0) UNION ALL
            SELECT n + 1, value * 16 + instr('123456789ABCDEF', substr(hex(xid), n, 1)) FROM digit WHERE n <= 4
        ) SELECT value FROM digit WHERE n = 5) || '-' ||
       (WITH RECURSIVE digit(n, value) AS (
            VALUES (5, 0) UNION ALL
            SELECT n + 1, value * 16 + instr('123456789ABCDEF', substr(hex(xid), n, 1)) FROM digit WHERE n <= 12
        ) SELECT value FROM digit WHERE n = 13) || '-' ||
       (WITH RECURSIVE digit(n, value) AS (
            VALUES (13, 0) UNION ALL
            SELECT n + 1, value * 16 + instr('123456789ABCDEF', substr(hex(xid), n, 1)) FROM digit WHERE n <= 24
        ) SELECT value FROM digit WHERE n = 25) || '-' ||
       lower(substr(hex(xid), 25, 8)) AS text
FROM global_transaction;

CREATE VIEW readable_transaction AS
SELECT t.text AS xid, g.name,
       CASE g.state WHEN 1 THEN 'trying' WHEN 2 THEN 'confirming' WHEN 3 THEN 'cancelling' WHEN 4 THEN 'confirmed'
                    WHEN 5 THEN 'cancelled' END AS state,
       (SELECT group_concat(participant, ', ') FROM
            (SELECT participant FROM branch WHERE xid = g.xid AND g.state IN (2, 3) AND state = 1 ORDER BY position)) AS waiting_for,
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
SELECT t.text AS xid, b.branch_id, b.action, b.participant, b.target,
       CASE WHEN b.state = 3 THEN 'resolved' WHEN g.state = 4 OR (g.state = 2 AND b.state = 2) THEN 'confirmed'
            WHEN g.state = 5 OR (g.state = 3 AND b.state = 2) THEN 'cancelled' ELSE 'registered' END AS state,
       b.attempts, b.needs_attention,
       strftime('%Y-%m-%d %H:%M:%f', b.due_at / 1000.0, 'unixepoch') AS due_at, b.error_code, b.error_message
FROM branch AS b JOIN global_transaction AS g ON g.xid = b.xid JOIN xid_text AS t ON t.xid = b.xid;
