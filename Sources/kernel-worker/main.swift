// The kernel lab's worker: `kernel-worker NAME FORMAT STORE [BASE]` serves /dev/dmu/NAME from an
// image until the device goes. Device 0 of the table is the store, device 1 the base.

import Glibc
import Worker

let words = Array(CommandLine.arguments.dropFirst())
guard words.count == 3 || words.count == 4 else {
  fputs("usage: kernel-worker NAME FORMAT STORE [BASE]\n", stderr)
  exit(2)
}
do throws(WorkerError) {
  try ByNode.run(
    format: words[1], store: words[2], base: words.count == 4 ? words[3] : nil, node: words[0])
} catch {
  fputs("kernel-worker: \(error)\n", stderr)
  exit(1)
}
