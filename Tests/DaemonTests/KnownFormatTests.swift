// SPDX-License-Identifier: Apache-2.0
// The daemon knows formats by name only, from a list of its own: it has to be that of the workers.

import DiskFormats
import Testing

@testable import Daemon

@Suite struct KnownFormatTests {
  @Test func areThoseThatThereAre() {
    #expect(KnownFormat.all.map(\.name).sorted() == FormatList.all.names)
  }

  /// Only stores that a worker makes have a block size in a spec.
  @Test func makesThoseThatWorkersMake() throws {
    for known in KnownFormat.all {
      let kind = try #require(FormatList.all.named(known.name))
      #expect((known.blockSizes != nil) == kind.format.makesStores, "\(known.name)")
    }
  }
}
