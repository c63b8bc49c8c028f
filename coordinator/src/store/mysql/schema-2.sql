-- Version 2: an owner is known by its epoch and its nonce, a transaction's row says how many branches it has, and the store remembers
-- which epochs have lost something. A confirmed transaction may have a result. A step may be run again, so each column is added only if it is not there yet.

-- A coordinator of version 1 that still runs, or waits as a standby, can neither take over nor write from here on: each of its
-- statements names the column `position`. It would not check the nonce.
SET @alter = (SELECT IF(COUNT(*) = 0, 'DO 0', 'ALTER TABLE `partition` RENAME COLUMN position TO batches')
    FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = 'partition' AND column_name = 'position');
PREPARE alter_table FROM @alter;
EXECUTE alter_table;

SET @alter = (SELECT IF(COUNT(*) > 0, 'DO 0',
    'ALTER TABLE `partition` ADD COLUMN nonce INT UNSIGNED NOT NULL DEFAULT 0 COMMENT ''random, of the epoch: two servers that went apart can have the same epoch, but not the same nonce''')
    FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = 'partition' AND column_name = 'nonce');
PREPARE alter_table FROM @alter;
EXECUTE alter_table;

UPDATE `partition` AS p JOIN epoch AS e ON e.`partition` = p.`partition` AND e.epoch = p.epoch SET p.nonce = e.nonce;

SET @alter = (SELECT IF(COUNT(*) > 0, 'DO 0',
    'ALTER TABLE epoch
        ADD COLUMN ended_at BIGINT COMMENT ''when the next owner took over; NULL: nobody has yet'',
        ADD COLUMN batches BIGINT COMMENT ''how many batches it had when the next owner took over: its own owner may know of more, which are lost then'',
        ADD COLUMN purges BIGINT NOT NULL DEFAULT 0 COMMENT ''steps of the purge under this epoch; each step counts, so that a takeover and a step of an earlier owner cannot both commit'',
        ADD COLUMN lost BIGINT COMMENT ''batches that the store acknowledged under this epoch and then lost, as its owner noticed; NULL: none. What is missing of such an epoch is answered LOST''')
    FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = 'epoch' AND column_name = 'lost');
PREPARE alter_table FROM @alter;
EXECUTE alter_table;

SET @alter = (SELECT IF(COUNT(*) > 0, 'DO 0',
    'ALTER TABLE global_transaction ADD COLUMN branches SMALLINT COMMENT ''how many rows it has in `branch`; NULL: recorded by version 1''')
    FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = 'global_transaction' AND column_name = 'branches');
PREPARE alter_table FROM @alter;
EXECUTE alter_table;

SET @alter = (SELECT IF(COUNT(*) > 0, 'DO 0',
    'ALTER TABLE global_transaction
        ADD COLUMN result BLOB COMMENT ''what its initiator gave with Confirm, for a repeat: at most 4 KiB; NULL: nothing'',
        ADD COLUMN result_type VARCHAR(128) COMMENT ''content type of the result''')
    FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = 'global_transaction' AND column_name = 'result');
PREPARE alter_table FROM @alter;
EXECUTE alter_table;
DEALLOCATE PREPARE alter_table;
