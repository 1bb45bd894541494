// SPDX-License-Identifier: Apache-2.0
// Enters a worker's cage and asks the kernel for one thing: for the tests that no worker gets it.
//
//   cage-trial CALL [USER]     CALL: see dmu_trial_call; "none" asks for nothing
//
// Exit status 0: it was allowed. Ended by SIGSYS: it was not. As root it becomes USER.

import CTrials
import Glibc
import SystemIO
import Worker

private func fail(_ text: String) -> Never {
  let bytes = Array((text + "\n").utf8)
  _ = write(2, bytes, bytes.count)
  exit(1)
}

private let words = CommandLine.arguments
guard words.count > 1 else { fail("usage: cage-trial CALL [USER]") }
private let user = words.count > 2 ? UInt32(words[2]) ?? 2_000_000 : 2_000_000

do throws(IOError) {
  try Cage.enter(uid: user, gid: user, files: 64)
} catch { fail("cannot enter the cage: \(error)") }
exit(dmu_trial_call(words[1]) < 0 ? 2 : 0)
